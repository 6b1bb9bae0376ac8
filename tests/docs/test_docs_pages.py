"""docs/options.md and docs/diffusers.md are what the code says."""

from __future__ import annotations

import pytest

from bilora_diffusion.config.refusals import REFUSED
from docs.diffusers_flags import DEFAULTS
from docs.make import FOLDER, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_makes(name: str) -> None:
    shown = (FOLDER / name).read_text(encoding="utf-8")
    assert shown == PAGES[name](), "an option has changed: run `python -m docs.make`"


def test_the_pages_leave_nothing_out() -> None:
    options, diffusers = PAGES["options.md"](), PAGES["diffusers.md"]()
    assert all(f"`--{name}`" in options and f"| `--{name}` |" in diffusers for name in DEFAULTS)
    assert all(entry.reason in options for entry in REFUSED)
    assert "without prior preservation" in options
