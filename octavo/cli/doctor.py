"""`octavo doctor`: looks at everything that Octavo needs of this machine, and says the fix of what is wrong.

Every check gives findings and changes nothing. torch is loaded in a process of its own, so that one that crashes or
hangs is a finding too.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from octavo.checkpoint.caches import hf_cache, modelscope_roots
from octavo.checkpoint.repository import free_disk
from octavo.cli.machine import gpus, version_of
from octavo.config import ServerOptions, cache_home, format_size
from octavo.errors import ConfigError
from octavo.kernels import library
from octavo.memory import free_ram
from octavo.version import __version__

_REQUIRED = ("numpy", "tokenizers", "jinja2", "fastapi", "uvicorn", "prometheus_client", "rich")
_OPTIONAL = {"huggingface_hub": "models of Hugging Face: pip install 'octavo[hub]'", "transformers": "octavo parity"}
_LEAST_MEMORY = 2 << 30  # the default model takes half of this, within the half of the free memory that it may have
_LEAST_DISK = 1 << 30
_SECONDS_FOR_TORCH = 400  # kernels for Hopper may have to be checked

# What kernels are chosen by, in the words of /proc/cpuinfo.
_KERNEL_WORDS = (
    *("amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "avx2"),
    *("i8mm", "bf16", "asimddp"),
)
_VARIABLES = (
    *("OCTAVO_HOME", "USE_HF", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"),
    *("MODELSCOPE_CACHE", "MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN", "MODELSCOPE_API_TOKEN"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
)

# Run by a Python of its own: what torch is, and whether each GPU can multiply.
_TORCH_PROGRAM = """
import json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads(), "gpus": []}
available = torch.cuda.is_available()
for index in range(torch.cuda.device_count() if available else 0):
    gpu = {"name": torch.cuda.get_device_name(index), "error": None}
    try:
        free, total = torch.cuda.mem_get_info(index)
        gpu |= {"free": free, "total": total}
        one = torch.ones(64, 64, device=f"cuda:{index}")
        assert (one @ one)[0, 0].item() == 64, "it multiplies wrongly"
        from octavo.ops import described
        gpu["kernels"] = described(one.device)
    except Exception as error:
        gpu["error"] = str(error).splitlines()[0]
    found["gpus"].append(gpu)
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """`status` is ok, warning (something will be slower or missing) or problem (Octavo will not run)."""

    area: str
    status: str
    text: str
    fix: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    """0 if Octavo can run here, 1 if a problem would keep it from that."""
    findings = list(examine())
    problems = sum(finding.status == "problem" for finding in findings)
    if arguments.json:
        print(json.dumps({"ok": not problems, "findings": [asdict(finding) for finding in findings]}))
    else:
        print("\n".join(_lines(findings)))
    return 1 if problems else 0


def examine() -> Iterator[Finding]:
    """All findings, in the order in which things must be right."""
    yield from _python()
    yield from _packages()
    yield from _torch_and_gpus()
    yield from _memory()
    yield from _disks()
    yield _port(ServerOptions().port)
    yield _kernels()
    yield _compiler()
    yield from _variables()


def _python() -> Iterator[Finding]:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}, Octavo {__version__}"
    yield Finding("python", "ok", text)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most != resource.RLIM_INFINITY and most < 4096:
        text = f"{most} open files at most; each open request takes one"
        yield Finding("files", "warning", text, "ulimit -n 65536 before octavo serve")


def _packages() -> Iterator[Finding]:
    versions = {name: version_of(name) for name in (*_REQUIRED, *_OPTIONAL)}
    there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield Finding("packages", "ok", there)
    for name in _REQUIRED:
        if versions[name] is None:
            yield Finding("packages", "problem", f"{name} is missing", f"pip install {name}")
    for name, use in _OPTIONAL.items():
        if versions[name] is None:
            yield Finding("packages", "ok", f"{name} is not installed (only for {use})")


def _torch_and_gpus() -> Iterator[Finding]:
    found, error = _ask_torch()
    if found is None:
        yield Finding("torch", "problem", error, "pip install torch (see https://pytorch.org/get-started)")
        return
    build = f"CUDA {found['cuda']}" if found["cuda"] else "without CUDA"
    yield Finding("torch", "ok", f"{found['version']} ({build}), {found['threads']} threads")
    for index, gpu in enumerate(found["gpus"]):
        if gpu["error"]:
            fix = "look at nvidia-smi and dmesg, or choose another with CUDA_VISIBLE_DEVICES, or use --device cpu"
            yield Finding("GPU", "warning", f"{index}: {gpu['name']} does not work: {gpu['error']}", fix)
        else:
            memory = f"{format_size(gpu['free'])} free of {format_size(gpu['total'])}"
            yield Finding("GPU", "ok", f"{index}: {gpu['name']}, {memory}")
            fix = "pip install a Triton that has them, such as the one that torch 2.11 brings"
            status = "warning" if "slower" in gpu["kernels"] else "ok"
            yield Finding("GPU", status, f"{index}: kernels: {gpu['kernels']}", fix if status == "warning" else "")
    if found["gpus"]:
        return
    if seen := gpus():
        text = f"the driver {seen[0].driver} shows {len(seen)} ({seen[0].name}), but torch can use none"
        fix = "update the NVIDIA driver" if found["cuda"] else "install a CUDA build of torch: https://pytorch.org"
        yield Finding("GPU", "warning", text, fix)
    else:
        yield Finding("GPU", "ok", "none; Octavo runs on the CPU")


def _ask_torch() -> tuple[dict[str, Any] | None, str]:
    """What torch says of itself, or (None, why it says nothing)."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _TORCH_PROGRAM],
            capture_output=True,
            text=True,
            timeout=_SECONDS_FOR_TORCH,
        )
        if done.returncode == 0:
            return json.loads(done.stdout.strip().splitlines()[-1]), ""
    except subprocess.TimeoutExpired:
        return None, f"torch does not answer within {_SECONDS_FOR_TORCH} s"
    except (OSError, ValueError, IndexError) as error:
        return None, f"torch cannot be asked: {error}"
    words = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
    return None, f"torch cannot be loaded: {words[-1]}"


def _memory() -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = free_ram()
    text = f"{format_size(free)} free of {format_size(total)}"
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (said := limit.read_text().strip()).isdigit():
        text += f", control group limit {format_size(int(said))}"
    fix = "stop other programs, raise the container's limit, or set --cpu-memory-utilization above 0.5"
    yield Finding("memory", "warning", text, fix) if free < _LEAST_MEMORY else Finding("memory", "ok", text)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("processor", "ok", f"{usable} cores usable of {os.cpu_count()}")


def _disks() -> Iterator[Finding]:
    places: tuple[tuple[str, Callable[[], Path], str], ...] = (
        ("Octavo", cache_home, "OCTAVO_HOME"),
        ("Hugging Face", hf_cache, "HF_HOME"),
        ("ModelScope", lambda: modelscope_roots()[-1], "MODELSCOPE_CACHE"),
    )
    for whose, find, variable in places:
        try:
            there = folder = find()
        except ConfigError as error:
            yield Finding("disk", "warning", f"{whose}: {error}", f"set {variable} to a folder")
            continue
        while not there.exists() and there != there.parent:
            there = there.parent
        free = free_disk(folder)
        text = f"{whose}: {folder}, {format_size(free)} free"
        fix = f"set {variable} to a folder on another disk"
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            yield Finding("disk", "warning", f"{text}, cannot be written", fix)
        elif free < _LEAST_DISK:
            yield Finding("disk", "warning", text, f"free some, or {fix}")
        else:
            yield Finding("disk", "ok", text)


def _port(port: int) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Finding("port", "warning", f"{port}: {error.strerror}", "octavo serve --port with another number")
    return Finding("port", "ok", f"{port} is free")


def _kernels() -> Finding:
    """Which build of the CPU's kernels is chosen, beside what this processor has for them."""
    chosen, (has, _) = library.load(), library.processor()
    words = [word for word in _KERNEL_WORDS if word in has]
    of_processor = f"; this processor has {', '.join(words)}" if words else ""
    if chosen is None:
        text = f"none of the CPU's kernels is built for it, and plain torch runs, much slower{of_processor}"
        return Finding("kernels", "warning", text, "install a C++ compiler, then install Octavo again")
    others = [name for name in library.builds() if name != chosen.name]
    text = f"{chosen.name} is chosen" + (f", also here: {', '.join(others)}" if others else "")
    return Finding("kernels", "ok", text + of_processor)


def _compiler() -> Finding:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return Finding("compiler", "ok", path)
    text = "no C++ compiler: kernels cannot be compiled, and the slower ones of torch run"
    return Finding("compiler", "warning", text, "install g++ or clang++ (Debian, Ubuntu: apt install g++)")


def _variables() -> Iterator[Finding]:
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    for name, value in given.items():
        yield Finding("variable", "ok", f"{name}={_shown(name, value)}")
    proxied = any(name.lower() in ("http_proxy", "all_proxy") for name in given)
    exempt = given.get("no_proxy") or given.get("NO_PROXY") or ""
    if proxied and not re.search(r"\*|localhost|127\.0\.0\.1", exempt):
        text = "a proxy is set, also for this machine itself: clients here would ask the proxy for octavo serve"
        yield Finding("proxy", "warning", text, "export no_proxy=localhost,127.0.0.1")


def _shown(name: str, value: str) -> str:
    """A value without what is secret in it: tokens, and the password in a proxy's address."""
    return "(set)" if name.endswith("TOKEN") else re.sub(r"//[^/@]*@", "//(secret)@", value)


def _lines(findings: list[Finding]) -> list[str]:
    """A line a finding, its area once, and what to do under it."""
    lines, before = [], ""
    marks = {"ok": " ", "warning": "!", "problem": "x"}
    for finding in findings:
        area = finding.area if finding.area != before else ""
        before = finding.area
        lines.append(f"{marks[finding.status]} {area:<10} {finding.text}")
        if finding.fix:
            lines.append(f"{'':13}-> {finding.fix}")
    warnings, problems = (sum(found.status == status for found in findings) for status in ("warning", "problem"))
    said = ", ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in ((problems, "problem"), (warnings, "warning")) if n)
    return [*lines, "", f"Octavo {'cannot run here' if problems else 'can run here'}{': ' + said if said else ''}"]
