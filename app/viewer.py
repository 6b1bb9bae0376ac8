"""Look at runs and results in a browser.

    python -m app.viewer                       # finds run and result folders below this folder
    python -m app.viewer demo --port 7861
    python -m app.viewer demo --host 0.0.0.0   # other machines may look and generate, too
    python -m app.viewer demo --allow_host lab.example   # behind a proxy of this name

Reads the files below ROOT and the base models that its runs name, and serves nothing else. It sends
no telemetry and loads nothing from the network.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from bilora_diffusion.core.errors import UserError, run_cli
from eval.command import Parser

# Gradio's own default
PORT = 7860
LOCAL = "127.0.0.1"
# Beginning of the name of a viewer's temporary folder, and the lock file in it.
CACHE_PREFIX = "bilora-viewer-"
CACHE_LOCK = "in-use.lock"
HOST_NAME = re.compile(r"[a-z0-9._-]+", re.IGNORECASE)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted, by Ctrl-C, SIGTERM or SIGHUP.

    Returns:
        The exit code: 0, or 2 after a sentence that says what to correct.
    """
    parser = Parser("app.viewer", __doc__)
    parser.add_argument(
        "root", nargs="?", type=Path, default=Path("."), metavar="ROOT", help="default: this folder"
    )
    parser.add_argument("--host", default=LOCAL, help=f"address to listen on; default: {LOCAL}")
    parser.add_argument(
        "--allow_host",
        action="append",
        default=[],
        metavar="NAME",
        help="another host name to answer to, such as a proxy's; can be given several times",
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}")
    parser.add_argument("--device", help="that generates images, such as cuda:1; default: the best")

    def work() -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):  # the usual end of a server
            serve(parser.read(argv))

    return run_cli(work)


def serve(args: argparse.Namespace) -> None:
    """Check the arguments, find the folders, and serve until interrupted."""
    from .catalog import Catalog

    public = args.host not in (LOCAL, "localhost", "::1")
    catalog = Catalog(args.root, public=public or bool(args.allow_host))
    check_names(args.allow_host)
    with listen(args.host, args.port) as listener, own_cache() as cache:
        be_private(cache)
        try:
            import gradio  # noqa: F401

            from . import guard, page
        except ModuleNotFoundError as error:
            raise UserError(
                f"the viewer needs {error.name}: run pip install 'bilora-diffusion[app]'"
            ) from error
        # Before the server is built, whose log keeps the stream that it finds.
        with contextlib.redirect_stderr(guard.ShortLines(sys.stderr)):
            server = page.server(
                catalog,
                host=args.host,
                public=public,
                device=args.device,
                allowed_hosts=args.allow_host,
            )
            address = f"[{args.host}]" if ":" in args.host else args.host
            url = f"http://{address}:{args.port}"
            print(f"{page.TITLE}: {url} shows {catalog.name}; Ctrl-C ends it.", flush=True)
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                signal.signal(signal.SIGHUP, server.handle_exit)  # uvicorn handles the other two
            server.run(sockets=[listener])
        if not server.started:
            raise UserError("the viewer's server did not start: its message is above")


@contextlib.contextmanager
def own_cache() -> Iterator[Path]:
    """A temporary folder of this viewer within the context.

    A viewer that was killed leaves its folder, with copies of what it served. The next one deletes
    it: a folder is in use as long as a process holds its lock.
    """
    with tempfile.TemporaryDirectory(prefix=CACHE_PREFIX) as folder:
        cache = Path(folder)
        with FileLock(cache / "new.lock"):
            # It gets its name when it is locked, since another viewer deletes a folder whose lock
            # nobody holds.
            (cache / "new.lock").rename(cache / CACHE_LOCK)
            delete_left_caches()
            yield cache


def delete_left_caches() -> None:
    """Delete the temporary folders of this user's viewers that have ended."""
    for folder in Path(tempfile.gettempdir()).glob(f"{CACHE_PREFIX}*"):
        lock_file = folder / CACHE_LOCK
        with contextlib.suppress(OSError, Timeout):
            status = folder.lstat()
            is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
            if is_own and lock_file.is_file():
                with FileLock(lock_file, timeout=0):
                    shutil.rmtree(folder)


def be_private(cache: Path) -> None:
    """Keep Gradio off the network, and give it a cache that no other program has.

    Gradio serves every file of its cache, which by default all programs of a machine share. It
    reads these variables when it is imported.
    """
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        HF_HUB_DISABLE_TELEMETRY="1",
        GRADIO_TEMP_DIR=str(cache / "files"),
        GRADIO_EXAMPLES_CACHE=str(cache / "examples"),
        GRADIO_ALLOWED_PATHS="",
    )


def listen(host: str, port: int) -> socket.socket:
    """Open the socket that the server listens on.

    Raises:
        UserError: the server can't listen on this address.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Port 0 would be any free one; -1 is refused.
        return socket.create_server((host, port or -1), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {host} --port {port} can't be opened ({error}): give an address of this"
            f" machine, such as {LOCAL}, and a free port from 1024 to 65535"
        ) from error


def check_names(names: Sequence[str]) -> None:
    """Refuse texts that are no host names, since they would match no request."""
    for name in names:
        if not HOST_NAME.fullmatch(name):
            raise UserError(
                f"--allow_host {name} is no host name: give the name alone, without http:// and"
                " port, such as lab.example"
            )


if __name__ == "__main__":
    sys.exit(main())
