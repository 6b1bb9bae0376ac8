"""Look at runs and results in a browser.

    python -m app.viewer                       # finds run and result folders below the current
    folder python -m app.viewer demo --port 7861 python -m app.viewer demo --host 0.0.0.0   # other
    machines may also view and generate images python -m app.viewer demo --allow_host lab.example
    # behind a proxy with this name

The viewer changes nothing below ROOT. It reads only files below ROOT, and the base models and LoRA
files that the runs name. It sends no telemetry and downloads nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bilora_diffusion.core.errors import UserError, run_cli
from eval.command import Parser

# Gradio's own default
PORT = 7860
LOCAL = "127.0.0.1"
HOST_NAME = re.compile(r"[a-z0-9._-]+", re.IGNORECASE)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C, SIGTERM or SIGHUP.

    Returns:
        The exit code: 0; 2 after an error message that names a fix; 1 after any other error.
    """
    parser = Parser("app.viewer", __doc__)
    parser.add_argument(
        "root",
        nargs="?",
        type=Path,
        default=Path("."),
        metavar="ROOT",
        help="folder that contains the runs; default: the current folder",
    )
    parser.add_argument("--host", default=LOCAL, help=f"address to listen on; default: {LOCAL}")
    parser.add_argument(
        "--allow_host",
        action="append",
        default=[],
        metavar="NAME",
        help="additional host name to accept, such as a proxy's; can be given several times",
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help=f"port to listen on; default: {PORT}"
    )
    parser.add_argument(
        "--device",
        help="device for sampling images, such as cuda:1; default: a CUDA GPU if there is one",
    )

    def work() -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):  # the normal way to stop the server
            serve(parser.read(argv))

    return run_cli(work)


def serve(args: argparse.Namespace) -> None:
    """Check the arguments, find the folders, and serve until interrupted."""
    from .catalog import Catalog

    public = args.host not in (LOCAL, "localhost", "::1")
    catalog = Catalog(args.root, public=public or bool(args.allow_host))
    check_names(args.allow_host)
    temporary_folder = tempfile.TemporaryDirectory(prefix="bilora-viewer-")
    with listen(args.host, args.port) as listener, temporary_folder as folder:
        set_variables(folder)
        try:
            import gradio  # noqa: F401

            from . import guard, page
        except ModuleNotFoundError as error:
            raise UserError(
                f"the viewer needs {error.name}: run pip install 'bilora-diffusion[app]'"
            ) from error
        # Redirect stderr before the server is built, because the server's log keeps the stream.
        with contextlib.redirect_stderr(guard.ShortLines(sys.stderr)):
            server = page.build_server(
                catalog,
                host=args.host,
                public=public,
                device=args.device,
                allowed_hosts=args.allow_host,
            )
            address = f"[{args.host}]" if ":" in args.host else args.host
            url = f"http://{address}:{args.port}"
            print(f"{page.TITLE}: {url} shows {catalog.name}; stop it with Ctrl-C.", flush=True)
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                signal.signal(
                    signal.SIGHUP, server.handle_exit
                )  # uvicorn handles SIGINT and SIGTERM
            server.run(sockets=[listener])
        if not server.started:
            raise UserError("the viewer's server did not start: see its message above")


def set_variables(folder: str) -> None:
    """Set the environment variables that Gradio reads when it is imported.

    They turn off telemetry and set Gradio's temporary folder. Gradio always creates this folder,
    and the default one may belong to another user of the machine.
    """
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_TEMP_DIR=folder
    )


def listen(host: str, port: int) -> socket.socket:
    """Open the socket that the server listens on.

    Raises:
        UserError: the server can't listen on this address.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Port 0 would mean any free port; -1 is passed instead and raises an error.
        return socket.create_server((host, port or -1), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {host} --port {port} can't be opened ({error}): give an address of this"
            f" machine, such as {LOCAL}, and a free port from 1024 to 65535"
        ) from error


def check_names(names: Sequence[str]) -> None:
    """Raise UserError if a name is not a host name: it would never match a request."""
    for name in names:
        if not HOST_NAME.fullmatch(name):
            raise UserError(
                f"--allow_host {name} is not a host name: give only the name, without http:// or a"
                " port, such as lab.example"
            )


if __name__ == "__main__":
    sys.exit(main())
