"""Makes docs/images/tensorboard.png: the TensorBoard page of the demo.

python docs/screenshot.py [--logdir runs/demo] [--output docs/images/tensorboard.png]

Needs Chromium or Chrome. Nothing leaves this machine.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from urllib.error import URLError
from urllib.parse import quote, urlencode
from urllib.request import urlopen

import gradwatch
from gradwatch_demo import run_demo

OUTPUT: Final = Path(__file__).parent / "images" / "tensorboard.png"
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
RUNS: Final = ("as_is", "advised")
TAGS: Final = (
    r"/(loss|gradient_norm|update_ratio|init)$"
    r"|_activation_(gain|norm)/hidden(1|10)$"
    r"|/stationarity(.upper)?$|/(sharpness|stability_ratio)$"
)
"""Twelve charts, as many as TensorBoard shows on a page."""
SIZE: Final = (1440, 1330)
PATIENCE: Final = 90.0
"""Seconds to wait for TensorBoard."""


def main() -> int:
    """Takes the picture.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description="a picture of the TensorBoard page of the demo")
    parser.add_argument("--logdir", type=Path, help="of an earlier demo; by default a new one")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"no browser: install one of {', '.join(BROWSERS)}", file=sys.stderr)
        return 2
    with TemporaryDirectory() as scratch:
        logdir = options.logdir or Path(scratch, "runs", "demo")
        if options.logdir is None:
            run_demo(logdir=logdir)
        with tensorboard(logdir) as address:
            wait_until_loaded(address, logdir)
            take_picture(browser, address, options.output, Path(scratch, "profile"))
    print(f"wrote {options.output}")
    return 0


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """Serves a folder on a free port of this machine.

    Args:
        logdir: the folder.

    Yields:
        The address of the page.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1"]
    # The page shows the folder as it was given: two levels of it are enough for a picture.
    above = logdir.resolve().parents[1]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--logdir", str(logdir.resolve().relative_to(above))],
        cwd=above,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=PATIENCE)


def wait_until_loaded(address: str, logdir: Path) -> None:
    """Waits until TensorBoard has read both runs to their last point.

    Args:
        address: of the page.
        logdir: the folder of the runs.

    Raises:
        TimeoutError: if that takes too long.
    """
    deadline = time.monotonic() + PATIENCE
    for run in RUNS:
        points = len(gradwatch.read(logdir / run).values("loss"))
        query = urlencode({"run": run, "tag": "gradwatch/loss"})
        while len(fetched(f"{address}/data/plugin/scalars/scalars?{query}")) < points:
            if time.monotonic() > deadline:
                raise TimeoutError(f"TensorBoard did not show {run} within {PATIENCE:.0f} s")
            time.sleep(0.5)


def fetched(url: str) -> list[Any]:
    """The points of a curve; none while TensorBoard is not ready."""
    try:
        with urlopen(url, timeout=5) as response:
            points: list[Any] = json.load(response)
            return points
    except (URLError, TimeoutError, ValueError):
        return []


def take_picture(browser: str, address: str, output: Path, profile: Path) -> None:
    """Opens the page of scalars in a browser without a window and saves what it shows.

    Args:
        browser: its program.
        address: of the page.
        output: the file to write.
        profile: an empty folder for the browser.
    """
    settings: Mapping[str, str] = {"_smoothingWeight": "0", "tagFilter": TAGS}
    fragment = "&".join(f"{name}={quote(value)}" for name, value in settings.items())
    output.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={SIZE[0]},{SIZE[1]}",
            # The page draws long before this much of its own clock has passed.
            "--virtual-time-budget=20000",
            f"--screenshot={output.resolve()}",
            f"{address}/#scalars&{fragment}",
        ],
        check=True,
        capture_output=True,
        timeout=PATIENCE,
    )


if __name__ == "__main__":
    sys.exit(main())
