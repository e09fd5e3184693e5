"""The engine process: `python -m octavo.engine DESCRIPTOR`, which `EngineClient` starts with its end of the channel."""

import socket
import sys

from octavo.engine.channel import EngineChannel
from octavo.engine.loop import run_engine

run_engine(EngineChannel(socket.socket(fileno=int(sys.argv[1]))))
