"""What tests ask of a page in a browser."""

from __future__ import annotations

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]
DRAWN = """() => [...document.querySelectorAll('.plot')]
    .filter(plot => !plot.closest('details:not([open])')).every(plot => plot.querySelector('.main-svg'))"""
OVERFLOW = "() => document.documentElement.scrollWidth - innerWidth"
