"""Questions answered during training, at set steps: how their metrics move beside the losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.config import Recipe
from tokenmill.trainer.distributed import World
from tokenmill.trainer.evaluate import prompts, report, strategies
from tokenmill.trainer.evaluate.prompts import By, Style
from tokenmill.trainer.evaluate.strategies import Asker, Strategy, check, check_lengths, named, usual
from tokenmill.trainer.evaluate.tasks import Question, load_questions
from tokenmill.trainer.model import Transformer


@dataclass(frozen=True)
class Evaluation:
    """One [[evaluate]] of a recipe."""

    name: str
    every: int | None
    asker: Asker
    questions: Sequence[Question]
    pool: Sequence[Question]
    strategy: Strategy
    by: By

    def metrics(self) -> dict[str, float]:
        """Those of `tokenmill eval`, as `name/accuracy`. Raises ValueError where the model's numbers are not finite."""
        self.asker.model.eval()
        answers = strategies.evaluate(self.asker, self.questions, self.strategy, by=self.by, pool=self.pool)
        return {
            f"{self.name}/{metric.name.replace(' ', '_')}": metric.observed
            for metric in report.metrics(report.to_rows(answers, {}))
        }


def evaluate(evaluations: Sequence[Evaluation], step: int, last: bool, say: Callable[[str], None]) -> dict[str, float]:
    """The metrics of those that are due. What goes wrong in one is said, and no reason to stop training."""
    found: dict[str, float] = {}
    for evaluation in evaluations:
        if last or (evaluation.every is not None and step % evaluation.every == 0):
            try:
                found |= evaluation.metrics()
            except ValueError as error:  # on all ranks, as they have the same numbers
                say(f"step {step}: {evaluation.name} is not evaluated: {error}")
    return found


def make_evaluations(recipe: Recipe, model: Transformer, tokenizer_from: Path, world: World) -> list[Evaluation]:
    """Those of a recipe. Of `model` only the shape is looked at, so that what can be wrong is said before training:
    raises ValueError naming the section where a file, a strategy or a question's length does not fit.
    """
    found: list[Evaluation] = []
    tokenizer = Tokenizer.open(tokenizer_from)
    for i, section in enumerate(recipe.evaluate):
        asker = Asker(
            model,
            tokenizer,
            section.template,
            recipe.seed,
            section.max_new_tokens,
            recipe.data.sequence_length * recipe.data.packs_per_micro_batch,
            world=world,
        )
        try:
            strategy = named(section.strategy, k=section.k)
            questions = load_questions(section.questions)[: section.limit]
            pool = load_questions(section.shots) if section.shots else []
            check(questions, strategy, by=section.by, pool=pool, template=section.template)
            by = section.by or usual(questions, strategy)
            if by == "generate" and world.size > 1:
                raise ValueError(
                    f"answers are generated one token at a time, which {world.size} processes do not do together: "
                    "take them by text or letter, or ask the checkpoints with `tokenmill eval`"
                )
            style = Style(by, strategy.reason, section.template)
            asked = [prompts.ask(question, [], tokenizer, style) for question in questions]
            check_lengths(asker, questions, asked, style)
        except ValueError as error:
            raise ValueError(f"evaluate.{i}: {error}") from None
        found.append(Evaluation(section.title, section.every, asker, questions, pool, strategy, by))
    return found
