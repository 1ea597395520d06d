"""Scores of written texts against references: BLEU (Papineni et al. 2002), ROUGE-L (Lin 2004) and exact match.

The arithmetic is sacrebleu's and rouge-score's; here is only how a prompt with several references is handed to them.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.config.load import Config
from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import info
from lora_ft.data.batches import UNSHARDED, Shard, split_evenly
from lora_ft.data.examples import Examples
from lora_ft.data.prepare import template_of
from lora_ft.distributed import processes
from lora_ft.evaluation.references import Questions, questions
from lora_ft.methods.interface import virtual_ids
from lora_ft.model.generate import decode

NEEDS = {"bleu": "sacrebleu", "rouge_l": "rouge_score"}  # import names


def check_installed(metrics: Sequence[str]) -> None:
    """Told before anything is spent.

    Raises:
        ConfigError: a library that a metric needs is not installed.
    """
    missing = [f"{m} needs {NEEDS[m]}" for m in metrics if m in NEEDS and not importlib.util.find_spec(NEEDS[m])]
    if missing:
        raise ConfigError(
            f"generation.metrics: {', '.join(missing)}, which is not installed: pip install 'lora-ft[generation]'"
        )


def text_metrics(metrics: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict:
    """The metrics named, of one text for each prompt and one or more references of each; surrounding white space is ignored.

    bleu: of the whole corpus, 0 to 100, with sacrebleu's own tokenization and signature. rouge_l: the mean over the
    prompts of the best F-measure among a prompt's references, 0 to 1, without stemming; rouge-score reads the letters a
    to z and digits alone. exact_match: the share of texts that equal one of their references.
    """
    texts = [text.strip() for text in texts]
    references = [[reference.strip() for reference in several] for several in references]
    found: dict = {}
    if "bleu" in metrics:
        from sacrebleu.metrics import BLEU

        # sacrebleu wants the first reference of every text, then the second of every text ...; None where there is none
        most = max(map(len, references))
        streams = [[several[i] if i < len(several) else None for several in references] for i in range(most)]
        bleu = BLEU(force=True)  # force: no warning about text that is tokenized already
        found["bleu"] = bleu.corpus_score(texts, streams).score  # type: ignore[arg-type]
        found["bleu_signature"] = str(bleu.get_signature())
    if "rouge_l" in metrics:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"])
        best = [scorer.score_multi(r, t)["rougeL"].fmeasure for r, t in zip(references, texts, strict=True)]
        found["rouge_l"] = sum(best) / len(best)
    if "exact_match" in metrics:
        found["exact_match"] = sum(t in r for r, t in zip(references, texts, strict=True)) / len(texts)
    return found


def questions_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, config: Config
) -> Questions:
    """What the model is asked for one eval set; a prompt leaves room for the new tokens within the model's positions.

    Raises:
        ConfigError: it leaves none; or rouge_l can't read the references.
    """
    data, generation = config.data, config.generation
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = (
        data.max_length
        if positions is None
        else min(data.max_length, positions - generation.max_new_tokens - len(virtual_ids(model)))
    )
    if room < 1:
        raise ConfigError(
            f"generation.max_new_tokens: {generation.max_new_tokens} leaves no room for a prompt in the model's "
            f"{positions} positions."
        )
    template, seed = template_of(data), config.train.seed
    asked = questions(examples, template, tokenizer, room=room, max_prompts=generation.max_prompts, seed=seed)
    if "rouge_l" in generation.metrics and not any(re.search("[a-zA-Z0-9]", r) for rs in asked.references for r in rs):
        raise ConfigError("generation.metrics: rouge_l reads the letters a to z and digits, and no reference has any.")
    if asked.cut:
        info(
            f"generation: {asked.cut:,} of {len(asked.ids):,} prompts are longer than {room} tokens and lose their start"
        )
    return asked


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Questions,
    config: Config,
    check: Callable[[], None] = lambda: None,
    shard: Shard = UNSHARDED,
) -> list[str]:
    """What the model writes after each prompt, decoded as the config says.

    Of several processes each decodes its share of the prompts; all return the texts of all. (Where the base is sharded they
    compute each token together, so each decodes every prompt.)
    """
    generation = config.generation
    names = ["max_new_tokens", "num_beams", "no_repeat_ngram_size", "do_sample"]
    # transformers warns of a setting that means nothing to a kind of decoding
    names += ["length_penalty"] if generation.num_beams > 1 else []
    names += ["temperature", "top_k", "top_p"] if generation.do_sample else []
    how = GenerationConfig(**{name: getattr(generation, name) for name in names})
    by_itself = shard.padded or shard.world_size == 1
    dealt = (
        [list(range(len(asked.ids)))] if by_itself else split_evenly([len(ids) for ids in asked.ids], shard.world_size)
    )
    mine = [asked.ids[i] for i in dealt[0 if by_itself else shard.rank]]
    found = decode(model, mine, how, asked.ends, batch_size=generation.batch_size, seed=config.train.seed, check=check)
    # a GPT-2 tokenizer may be set to write "end." for the tokens "end ."
    plainly = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    written = [tokenizer.decode(ids, **plainly).strip() for ids in found]
    texts = [""] * len(asked.ids)
    for indices, theirs in zip(dealt, [written] if by_itself else processes.all_gather(written), strict=True):
        for i, text in zip(indices, theirs, strict=True):
            texts[i] = text
    return texts
