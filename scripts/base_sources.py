"""Which files decide what scripts/make_base.py makes: a base of other contents than theirs is made again."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def base_sources() -> list[Path]:
    """The script with its rows and words, and the families' networks, tokenizers and prompts."""
    scripts = [ROOT / "scripts" / f"{name}.py" for name in ("make_base", "make_data", "data_words")]
    rooms = ("glm1", "glm2", "glm3", "modeling", "generation")
    return [*scripts, *(path for room in rooms for path in sorted((ROOT / room).glob("*.py")))]
