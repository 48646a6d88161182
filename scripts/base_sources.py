"""Which files decide what scripts/make_base.py makes: a base of other contents than theirs is made again."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def base_sources() -> list[Path]:
    """The script with its rows and words, and the families' networks, tokenizers and prompts."""
    scripts = [ROOT / "scripts" / f"{name}.py" for name in ("make_base", "make_data", "data_words")]
    return [*scripts, *sorted(ROOT.glob("glm*/*.py"))]
