"""DPO and IPO as TRL computes them, where it is installed: the loss of a batch, its gradients and its rewards."""

import random

import pytest
import torch

from tokenmill.data.batch import Batch
from tokenmill.data.unfold import unfold
from tokenmill.trainer.config import DpoSection, LossSection
from tokenmill.trainer.model import ModelConfig, Transformer
from tokenmill.trainer.model.weights import save_hf
from tokenmill.trainer.objectives.dpo import Dpo, answer_logprobs
from tokenmill.trainer.objectives.pretrain import StepContext

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, of which there are many
trl = pytest.importorskip("trl")
PAIRS = ((9, 4, 6), (3, 1, 5), (20, 8, 2))  # tokens of prompt, chosen and rejected


def both(folder, seed: int):
    """A model of ours with weights large enough for losses to differ, and the same in Hugging Face's."""
    import transformers

    model = Transformer(ModelConfig(32, 2, 4, 2, 8, 48, 61))
    model.initialise(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    save_hf(model, folder)
    return model, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_loss_and_gradients(kind, tmp_path):
    import datasets  # pyright: ignore[reportMissingImports]
    import tokenizers
    import transformers

    ours, theirs = both(tmp_path / "policy", 0)
    reference, their_reference = both(tmp_path / "reference", 1)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(61)}, unk_token="t0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t3"
    )
    draw = random.Random(0)
    names = ("prompt", "chosen", "rejected")
    texts = [
        {name: "".join(f" t{draw.randrange(4, 61)}" for _ in range(n)) for name, n in zip(names, lengths, strict=True)}
        for lengths in PAIRS
    ]
    trainer = trl.DPOTrainer(
        model=theirs,
        ref_model=their_reference,
        args=trl.DPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=3, beta=0.3, loss_type=[kind], max_length=None,
            report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer,
    )  # fmt: skip
    rows = list(trainer.train_dataset)
    theirs.eval()
    expected = trainer.compute_loss(theirs, dict(trainer.data_collator(rows)))
    expected.backward()

    pairs = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
    documents = [[*p, *c, p[-1], *r] for p, c, r in pairs]
    masks = [[0] * len(p) + [1] * len(c) + [0] + [1] * len(r) for p, c, r in pairs]
    batch = unfold(Batch.from_documents(documents, masks))
    with torch.no_grad():
        table, _ = answer_logprobs(reference, batch)
    context = StepContext(0, len(pairs), batch.tokens.numel(), None, LossSection())
    loss = Dpo(DpoSection(kind, beta=0.3), [table])(ours, batch, context)
    loss.total.backward()

    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, other in (
        (ours.head.weight, theirs.lm_head.weight),
        (ours.embed.weight, theirs.model.embed_tokens.weight),
        (ours.get_parameter("blocks.0.feed_forward.down.weight"), theirs.model.layers[0].mlp.down_proj.weight),
    ):
        assert ((mine.grad - other.grad).norm() / other.grad.norm()).item() < 1e-5
