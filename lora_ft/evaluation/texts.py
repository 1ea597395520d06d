"""Generated texts and their scores against references: BLEU (Papineni et al. 2002), ROUGE-L (Lin 2004), exact match.

The arithmetic is sacrebleu's and rouge-score's; this module only passes them prompts with several references.
"""

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.config.schema import Config
from lora_ft.core.errors import ConfigError
from lora_ft.data.batches import UNSHARDED, Shard, split_evenly
from lora_ft.data.chats.format import end_tokens
from lora_ft.data.prepare import find_chat
from lora_ft.distributed import processes
from lora_ft.evaluation.paired import Rows
from lora_ft.evaluation.references import EvalPrompts
from lora_ft.model.generate import generate_in_batches, to_text

LIBRARIES = {"bleu": "sacrebleu", "rouge_l": "rouge_score"}  # metric -> import name


def check_installed(metrics: Sequence[str]) -> None:
    """Raise ConfigError unless the libraries of `metrics` are installed, before any time is spent."""
    needed = [(metric, name) for metric, name in LIBRARIES.items() if metric in metrics]
    if missing := [f"{metric} needs {name}" for metric, name in needed if not importlib.util.find_spec(name)]:
        way = "pip install 'lora-ft[generation]'"
        raise ConfigError(f"generation.metrics: {', '.join(missing)}, which is not installed: {way}")


def text_metrics(
    metrics: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, Any], Rows]:
    """Score one text per prompt against that prompt's references, and what each adds; surrounding white space is ignored.

    bleu: corpus BLEU, 0 to 100, with sacrebleu's default tokenization, and its signature. rouge_l: the mean over prompts of
    the best F-measure among the references, 0 to 1, without stemming; rouge-score reads only the letters a to z and digits.
    exact_match: the share of texts that equal one of their references.
    """
    texts = [text.strip() for text in texts]
    references = [[reference.strip() for reference in several] for several in references]
    scores: dict[str, Any] = {}
    rows: Rows = {}
    if "bleu" in metrics:
        from sacrebleu.metrics import BLEU

        # sacrebleu takes the first reference of every text, then the second of every text ...; None where there is none
        most = max(map(len, references))
        streams = [[several[i] if i < len(several) else None for several in references] for i in range(most)]
        bleu = BLEU(force=True)  # force: no warning about texts that are tokenized already
        scores["bleu"] = bleu.corpus_score(texts, streams).score  # type: ignore[arg-type]
        scores["bleu_signature"] = str(bleu.get_signature())
        one = BLEU(effective_order=True)  # for its counts, which are those of the corpus; True: no warning
        parts = [one.sentence_score(text, several) for text, several in zip(texts, references, strict=True)]
        rows["bleu"] = np.array([[*p.counts, *p.totals, p.sys_len, p.ref_len] for p in parts], dtype=float)
    if "rouge_l" in metrics:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"])
        pairs = zip(references, texts, strict=True)
        rows["rouge_l"] = np.array([[scorer.score_multi(several, text)["rougeL"].fmeasure] for several, text in pairs])
    if "exact_match" in metrics:
        rows["exact_match"] = np.array([[float(t in r)] for r, t in zip(references, texts, strict=True)])
    return scores | {key: float(rows[key].mean()) for key in rows if key != "bleu"}, rows


def bleu_of(rows: np.ndarray) -> float:
    """Corpus BLEU of the rows of `text_metrics`."""
    from sacrebleu.metrics import BLEU

    counts = rows.sum(0).astype(int).tolist()
    return BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: EvalPrompts,
    config: Config,
    check: Callable[[], None] | None = None,
    shard: Shard = UNSHARDED,
) -> list[str]:
    """Generate a text for each prompt as the config's `generation` section says; every rank returns the texts of all.

    Each rank generates its part of them, or all where the base is sharded: there all ranks compute every token together.
    """
    settings, names = config.generation, ["max_new_tokens", "num_beams", "no_repeat_ngram_size", "do_sample"]
    # transformers warns of settings that a kind of decoding doesn't use
    names += ["length_penalty"] if settings.num_beams > 1 else []
    names += ["temperature", "top_k", "top_p"] if settings.do_sample else []
    ranks = 1 if shard.padded else shard.world_size  # that generate different prompts
    parts = split_evenly(list(map(len, prompts.ids)), ranks)
    chat = find_chat(config.data, tokenizer)
    template = chat.template if chat and config.data.messages else ""
    generated = generate_in_batches(
        model,
        [prompts.ids[i] for i in parts[shard.rank % ranks]],
        GenerationConfig(**{name: getattr(settings, name) for name in names}),
        end_tokens(tokenizer, model.generation_config, chat),
        batch_size=settings.batch_size,
        seed=config.train.seed,
        check=check,
    )
    own = [to_text(tokenizer, row.ids, template) for row in generated]
    if chat and chat.reasoning_close and config.data.reasoning == "drop":  # what is compared is what was learned
        own = [text.rpartition(chat.reasoning_close)[2] for text in own]
    own = [text.strip() for text in own]
    texts = itertools.chain.from_iterable(processes.all_gather(own) if ranks > 1 else [own])
    by_prompt = dict(zip(itertools.chain.from_iterable(parts), texts, strict=True))
    return [by_prompt[i] for i in range(len(prompts.ids))]
