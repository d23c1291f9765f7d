"""Runs (`*.yaml`) and model presets (`presets/*.yaml`), shipped inside the package so that a name is enough."""

from pathlib import Path

RECIPES_DIR = Path(__file__).parent
PRESETS_DIR = RECIPES_DIR / "presets"
