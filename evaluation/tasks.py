"""The table of `--task`: which metrics an answer is scored with. Adding a task is an entry here."""

from dataclasses import dataclass

from runtime.exits import UserError


@dataclass(frozen=True)
class Task:
    """A kind of answer.

    metrics: names in metrics.METRICS, in the order of the table. primary: the one to choose a checkpoint by; more is
    better. all_answers: do all answers of a row count, or the first alone? confusion: is there a table of labels?
    has_references: are answers compared with references, or with each other alone?
    missing: the rule and the fix to tell where the rows give no value for the primary metric.
    """

    name: str
    metrics: tuple
    primary: str
    all_answers: bool = False
    confusion: bool = False
    has_references: bool = True
    missing: tuple = ("no row gives a value for it", "choose another task")


ROUGE = ("rouge1", "rouge2", "rougeL")
TRIPLES = ("precision", "recall", "f1", "precision_micro", "recall_micro", "f1_micro")
LABELS = ("accuracy", "macro_f1")
QUESTIONS = ("diversity", "repeated_questions", "empty_questions", "overlong_questions")

TASKS = {
    "extraction": Task(
        name="extraction",
        metrics=(*TRIPLES, "exact_match"),
        primary="f1",
        missing=("no reference has a triple, a line such as head_relation_tail", "choose another task"),
    ),
    "generation": Task(
        name="generation",
        metrics=(*ROUGE, "bleu4", "bleu4_words"),
        primary="rougeL",
    ),
    "classification": Task(
        name="classification",
        metrics=LABELS,
        primary="accuracy",
        confusion=True,
    ),
    "summary": Task(
        name="summary",
        metrics=(*ROUGE, "bleu4"),
        primary="rougeL",
    ),
    "questions": Task(
        name="questions",
        metrics=QUESTIONS,
        primary="diversity",
        all_answers=True,
        has_references=False,
        missing=(
            "every row has one answer, and one question cannot repeat another",
            "predict with --do_sample --num_return_sequences 5",
        ),
    ),
}
# What is scored where no task is named.
NO_TASK = Task(name="", metrics=(*ROUGE, "bleu4", "bleu4_words", *TRIPLES, "exact_match"), primary="rougeL")


def find_task(name: str | None) -> Task:
    """The entry of the table by its name; None is the scoring without a task."""
    if name is None:
        return NO_TASK
    if name not in TASKS:
        raise UserError(f"task {name!r}: is none of {', '.join(TASKS)}")
    return TASKS[name]
