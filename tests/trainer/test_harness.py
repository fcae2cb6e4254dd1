"""Our checkpoints under lm-eval, the real package, where it is installed: its accuracies and ours on the same
questions, and its own runner of Hugging Face models on the exported weights."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.data import chat
from tokenmill.data.batch import Batch
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.checkpoint import save_checkpoint
from tokenmill.trainer.evaluate.strategies import Asker, evaluate
from tokenmill.trainer.evaluate.tasks import load_questions
from tokenmill.trainer.model import ModelConfig, MoEConfig, Transformer
from tokenmill.trainer.model.generate import generate

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, of which there are many
lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # noqa: E402  # pyright: ignore[reportMissingImports]

from tokenmill.trainer import harness as of_harness  # noqa: E402

HarnessModel: Any = of_harness.HarnessModel  # which lm-eval's decorator hides from a type checker

MEDQA = Path(__file__).parents[3] / "shared" / "data" / "medqa_us_test.jsonl.gz"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_choice: {choices}
doc_to_target: "{{{{['A', 'B', 'C', 'D'].index(answer)}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
LISTED = "{{question}}\\nA. {{options.A}}\\nB. {{options.B}}\\nC. {{options.C}}\\nD. {{options.D}}\\n"
TASKS = {
    "text": ("Question: {{question}}\\nAnswer:", '"{{options.values() | list}}"'),
    "letter": (f"Question: {LISTED}Answer:", "[A, B, C, D]"),
    "chat": (f"{LISTED}Answer with the letter of the right option.", "[A, B, C, D]"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model, twenty questions, MedQA's where they are here, and their tasks for the harness."""
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = Tokenizer.open("mistral-v1")
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    model = Transformer(
        ModelConfig(
            dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=tokenizer.vocab_size,
            sliding_window=64, max_positions=600, moe=MoEConfig(4, 2),
        )
    )  # fmt: skip
    model.initialise(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from the small weights at which all answers are nearly equal
    save_checkpoint(folder / "model", model, tokenizer_from=folder)
    options = dict(zip("ABCD", ("iron", "a scan", "morphine (IV)", "rest; then, fluids"), strict=True))
    rows = [{"question": f"A {i} year old is pale. What now?", "options": options, "answer": "A"} for i in range(200)]
    if MEDQA.exists():
        rows = [json.loads(line) for line in gzip.decompress(MEDQA.read_bytes()).splitlines()]
    rows = [row for row in rows if len(row["question"]) < 1000][:20]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, (text, choices) in TASKS.items():
        (folder / "tasks").mkdir(exist_ok=True)
        task = TASK.format(name=f"our_{name}", folder=folder, text=text, choices=choices)
        (folder / "tasks" / f"{name}.yaml").write_text(task)
    return folder


@pytest.fixture(scope="module")
def harness(folder) -> Any:
    return HarnessModel(folder / "model", tokens_per_batch=2000)


def run(folder: Path, model: Any, *names: str, **options: Any) -> dict[str, tuple[float, list[list[float]]]]:
    """Of each task, the accuracy and the log-probabilities of every question's options."""
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[f"our_{name}" for name in names],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )
    return {
        name: (
            found["results"][f"our_{name}"]["acc,none"],
            [
                [float(response[0][0]) for response in sample["resps"]]
                for sample in sorted(found["samples"][f"our_{name}"], key=lambda sample: sample["doc_id"])
            ],
        )
        for name in names
    }


def ours(folder: Path, harness: Any, by: Any, template: str) -> tuple[float, list[Any]]:
    answers = evaluate(
        Asker(harness.model, harness.tokenizer, template), load_questions(folder / "questions.jsonl"), by=by
    )
    return sum(answer.correct for answer in answers) / len(answers), [list(a.votes[0].logprobs or ()) for a in answers]


def test_the_accuracies_are_ours(folder, harness):
    theirs = run(folder, harness, "text", "letter") | run(folder, harness, "chat", apply_chat_template=True)
    for name, by, template in (("text", "text", "plain"), ("letter", "letter", "plain"), ("chat", "letter", "auto")):
        accuracy, logprobs = ours(folder, harness, by, template)
        assert theirs[name][0] == accuracy, name
        assert theirs[name][1] == [pytest.approx(row, rel=1e-5) for row in logprobs], name
    assert len({str(logprobs) for _, logprobs in theirs.values()}) == 3


@pytest.mark.slow
def test_their_runner_of_the_exported_model_agrees(folder, harness):
    """Hugging Face's model and tokenizer, by the code that most published numbers come from."""
    from lm_eval.models import huggingface  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, LlamaTokenizer

    from tokenmill.trainer.model.weights import save_hf

    save_hf(harness.model, folder / "hf")
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    tokenizer = LlamaTokenizer.from_pretrained(str(folder / "model"), legacy=True, add_bos_token=True)
    theirs: Any = huggingface.HFLM
    peer = theirs(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=600, add_bos_token=True, device="cpu")
    for name, (accuracy, logprobs) in run(folder, peer, "text", "letter").items():
        mine = run(folder, harness, name)[name]
        assert mine[0] == accuracy
        assert mine[1] == [pytest.approx(row, rel=1e-4) for row in logprobs]


def ask(kind: str, *arguments: Any) -> list[Any]:
    return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]  # type: ignore[arg-type]


def logits(harness: Any, ids: list[int]) -> torch.Tensor:
    return harness.model.logits(Batch.from_documents([ids])).detach().log_softmax(-1)


def test_greedy_and_borders(harness):
    """Whether a continuation is greedy; spaces between context and continuation; no context; one context for many."""
    ids = [1, *harness.tokenizer.encode("Give iron")]
    likeliest = int(logits(harness, ids)[-1].argmax())
    greedy = harness.tokenizer.decode([*ids[1:], likeliest]).removeprefix("Give iron")
    many = [("Give iron", f" word{i}") for i in range(900)]  # more than fit into one batch
    first, second, third, spaced, empty, *rest = harness.loglikelihood(
        ask("loglikelihood", ("Give iron", greedy), ("Give iron", " and rest"), ("Give", " iron and rest"),
            ("Give iron ", "and rest"), ("", "Give iron"), *many)
    )  # fmt: skip
    whole = [1, *harness.tokenizer.encode("Give iron and rest")]
    rows = logits(harness, whole).gather(1, torch.tensor([*whole[1:], 0])[:, None])[:, 0]
    assert first[1]
    assert not second[1]
    assert second == spaced
    assert second[0] == pytest.approx(rows[len(ids) - 1 : -1].sum().item(), rel=1e-4)
    assert third[0] == pytest.approx(rows[1:-1].sum().item() if len(ids) == 3 else third[0], rel=1e-4)
    assert empty[0] == pytest.approx(rows[: len(ids) - 1].sum().item(), rel=1e-4)
    alone = harness.loglikelihood(ask("loglikelihood", many[7], many[899]))
    assert [rest[7][0], rest[899][0]] == [pytest.approx(score[0], rel=1e-4) for score in alone]


def test_long_texts(harness):
    """Rolling windows predict each token once; a long context loses its beginning; a continuation cannot."""
    text = "Iron is given for anaemia. " * 170
    ids = [1, *harness.tokenizer.encode(text)]
    assert 2 * 600 < len(ids) - 1 < 3 * 600
    windows = [ids[:601], ids[600:1201], ids[-601:]]
    scores = [logits(harness, window[:-1]).gather(1, torch.tensor(window[1:])[:, None])[:, 0] for window in windows]
    expected = scores[0].sum() + scores[1].sum() + scores[2][-(len(ids) - 1201) :].sum()
    short = "Iron is given."
    alone = harness.loglikelihood(ask("loglikelihood", ("", short)))[0][0]
    rolled = harness.loglikelihood_rolling(ask("loglikelihood_rolling", (text,), (short,), ("",)))
    assert rolled == [pytest.approx(expected.item(), rel=1e-4), pytest.approx(alone, rel=1e-4), 0.0]
    with pytest.warns(UserWarning, match="tokens is cut to its last 599"):
        (cut,) = harness.loglikelihood(ask("loglikelihood", (text.strip(), " Rest.")))
    window = [*harness.tokenizer.encode(text.strip() + " Rest.")][-601:]
    rows = logits(harness, window[:-1]).gather(1, torch.tensor(window[1:])[:, None])[:, 0]
    assert cut[0] == pytest.approx(rows[-2:].sum().item(), rel=1e-4)
    with pytest.raises(ValueError, match="a continuation of .* tokens exceeds the model's 600 positions"):
        harness.loglikelihood(ask("loglikelihood", ("a", text)))


def test_generation(harness):
    """Text up to a string, which spans tokens; the other sequences go on, as the same ids as ours."""
    prompts = ["Give iron", "What is pale?", "The scan shows"]
    ids = [[1, *harness.tokenizer.encode(prompt)] for prompt in prompts]
    whole = [harness.tokenizer.decode(row[0]) for row in generate(harness.model, ids, max_new_tokens=20, stop={2})]
    end = whole[1][9:15]
    free = {"until": ["never said"], "max_gen_toks": 20}
    texts = harness.generate_until(
        ask("generate_until", (prompts[0], free), (prompts[1], {"until": end, "max_gen_toks": 20}), (prompts[2], free),
            (prompts[0], {"max_new_tokens": 4, "do_sample": False, "temperature": 0.7, "until": []}))
    )  # fmt: skip
    assert texts[0] == whole[0]
    assert texts[1] == whole[1].partition(end)[0]
    assert texts[2] == whole[2]
    assert whole[0].startswith(texts[3])
    assert 0 < len(texts[3]) < len(whole[0])
    passes = []
    hook = harness.model.register_forward_hook(lambda *_: passes.append(1))
    harness.generate_until(ask("generate_until", (prompts[1], {"until": [end], "max_gen_toks": 20})))
    hook.remove()
    assert len(passes) < 20, "it went on behind the string that ends it"
    with pytest.raises(ValueError, match="generation option 'top_k' is not known"):
        harness.generate_until(ask("generate_until", (prompts[0], {"top_k": 3})))
    drawn = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 20}
    assert harness.generate_until(ask("generate_until", (prompts[0], drawn))) != [whole[0]]


def test_chats_are_rendered_in_ids(harness):
    """A turn before, whose end is a control piece no text can spell; and an answer that is begun."""
    history = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
    ]
    prompt = chat.prompt(history, harness.tokenizer)
    assert 2 in prompt
    asked = harness.apply_chat_template(history)
    begun = harness.apply_chat_template(
        [*history, {"role": "assistant", "content": "I say"}], add_generation_prompt=False
    )
    assert harness._pair(asked, "B") == (prompt, harness.tokenizer.encode("B"))
    assert harness._pair(begun, " B") == (
        [*prompt, *harness.tokenizer.encode("I say")], harness.tokenizer.encode("I say B")[2:],
    )  # fmt: skip
    assert harness._prompt(begun, 5) == [*prompt, *harness.tokenizer.encode("I say")]
    assert harness.chat_template() == "mistral-v1"
    assert harness.chat_template(False) == ""


@pytest.mark.slow
def test_the_command(folder):
    command = f"-m tokenmill.trainer.harness run --model tokenmill --model_args path={folder}/model --tasks our_letter"
    more = f"--include_path {folder}/tasks --limit 5 --output_path {folder}/out.json"
    done = subprocess.run(
        [sys.executable, *command.split(), *more.split()], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "|our_letter|" in done.stdout
    (results,) = folder.glob("out*.json")
    assert json.loads(results.read_text())["results"]["our_letter"]["sample_len"] == 5
    done = subprocess.run(
        [sys.executable, *command.replace("/model ", "/nowhere ").split(), *more.split()],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"tokenmill: error: {folder}/nowhere: expected a checkpoint")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"template": "llama"}, "template 'llama' is not one of"),
        ({"dtype": "fp8"}, "dtype: expected one of fp32, bf16, fp16, got 'fp8'"),
        ({"device": "tpu"}, "device: expected auto, cpu or cuda, got 'tpu'"),
        ({"path": "nowhere"}, "nowhere: expected a checkpoint"),
    ],
)
def test_wrong_arguments(folder, options, said):
    with pytest.raises(ValueError, match=said):
        HarnessModel(**({"path": folder / "model"} | options))
