"""The last line of a benchmark."""

import json
from typing import Any


def print_json(figures: dict[str, Any]):
    """One line; floats with four digits."""
    print(json.dumps(rounded(figures)), flush=True)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: rounded(x) for k, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
