"""The engine process: loads the model, then steps while there is work and sleeps otherwise.

A thread of its own receives and confirms, so that a request is safe here although a step takes long, and notices a
parent that is gone although the main thread hangs.
"""

import contextlib
import gc
import os
import queue
import signal
import threading
import time
import traceback
from typing import Any

from octavo import log
from octavo.engine.channel import EngineChannel, Message
from octavo.engine.report import Report
from octavo.engine.state import StepOutput
from octavo.errors import OctavoError, internal_error
from octavo.log import logger
from octavo.request import Request
from octavo.timeline import process_age

# How long the engine may take to end by itself when its parent is gone: it may save blocks to the prefix store.
_EXIT_SECONDS = 5.0


def run_engine(channel: EngineChannel) -> None:
    """Main function of the engine process; its first message says which engine."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        _, options, verbose, log_format = channel.receive()
    except (EOFError, OSError):
        return
    log.setup(verbose, process="engine", lines=log_format)
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(channel, inbox), name="octavo-receive", daemon=True).start()
    try:
        from octavo.engine.engine import Engine

        began = process_age()
        if options.warm_up is None:  # many callers will come, and none should wait for what can be done before
            options.warm_up = "quick"
        engine = Engine.build(options)
        engine.timeline.insert(0, ("engine process", began))
        # Who stops a process group stops the parent too, which may let requests finish first. It says when to stop,
        # and its end is the channel's end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        channel.send("ready", engine.info())
        gc.collect()
        gc.freeze()
        serve(engine, channel, inbox)
    except (BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except BaseException as error:
        if not isinstance(error, OctavoError):
            traceback.print_exc()
        text = str(error) if isinstance(error, OctavoError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            channel.send("failed", text, type(error).__name__)
        raise SystemExit(1) from None


def _receive(channel: EngineChannel, inbox: "queue.SimpleQueue[Message]") -> None:
    """Puts what comes into the inbox, and confirms requests, until the parent is gone or says stop."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            message = channel.receive()
            inbox.put(message)
            if message[0] == "add":
                channel.send("confirmed")
    inbox.put(("stop",))
    time.sleep(_EXIT_SECONDS)
    os._exit(1)  # the main thread hangs


def serve(engine: Any, channel: EngineChannel, inbox: "queue.SimpleQueue[Message]") -> None:
    """Runs `engine` (an `Engine`) until it is told to stop."""
    report = Report()
    while True:
        while not inbox.empty() or not engine.has_work():
            while inbox.empty() and (engine.save_idle() or engine.prepare()):
                pass
            kind, *values = inbox.get()
            if kind == "stop":
                engine.shutdown()
                return
            if kind == "abort":
                engine.abort(*values)
                if not engine.has_work():  # no step will tell that the blocks are back
                    channel.send("step", StepOutput(tokens=[]), engine.stats())
            elif kind == "add":
                _add(engine, values[0], channel)
        output = engine.step()
        stats = engine.stats()
        channel.send("step", output, stats)
        report.step(stats)


def _add(engine: Any, request: Request, channel: EngineChannel) -> None:
    """Queues a request; whatever is wrong with it is its own affair."""
    try:
        engine.add(request)
    except OctavoError as error:
        channel.send("refused", request.request_id, error)
    except Exception as error:
        logger.exception("request %s cannot be queued", request.request_id)
        channel.send("refused", request.request_id, internal_error(error))
