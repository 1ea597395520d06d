"""Rules between settings, that no setting can check alone."""

from collections.abc import Iterator

from lora_ft.config import training_arguments
from lora_ft.config.adapter_settings import methods_of
from lora_ft.config.problems import Place
from lora_ft.config.schema import Config, GenerationConfig, eval_sets
from lora_ft.core.messages import format_value
from lora_ft.core.metrics import SELECTION_METRICS, TEXT_METRICS, add_set_name, selection_metric
from lora_ft.core.names import nearest, template_columns

NEEDS_EVAL = "needs data.eval: a data source, or a fraction (0.05) or count (500) held out of data.train"


def rules(config: Config) -> Iterator[tuple[Place, tuple[Place, ...], str]]:
    """The rules between settings that are broken: (where, what else took part, what is wrong and what to do)."""
    adapter, data, train = config.adapter, config.data, config.train
    forms = [form for form in ("prompt", "completion", "text", "messages") if getattr(data, form) is not None]
    paths = tuple(("data", form) for form in ("prompt", "completion", "text", "messages"))
    one = "give one form: prompt and completion, text, or messages"
    if not forms:
        yield ("data",), paths, f"says nothing about what to learn; {one}"
    elif forms in (["prompt"], ["completion"]):
        other = "completion" if forms == ["prompt"] else "prompt"
        yield ("data", forms[0]), paths, f"has no {other}; give both, or text alone"
    elif len(forms) > 1 and forms != ["prompt", "completion"]:
        yield ("data", forms[-1]), paths, f"can't stand beside {' and '.join(forms[:-1])}; {one}"
    elif data.label_names is not None:
        column, involved = next(iter(data.label_names)), (("data", "label_names"), *paths)
        columns = template_columns(data.completion) if data.completion else ()
        if not data.completion:
            yield ("data", "label_names"), involved, f"needs prompt and completion; this config has {forms[0]}"
        elif column not in columns:
            has = ", ".join(format_value(c) for c in columns)
            yield (
                ("data", "label_names"),
                involved,
                f"{format_value(column)} is no column of data.completion, which has {has}",
            )
    if data.chat_template is not None and forms and data.messages is None:
        yield ("data", "chat_template"), paths, "is used with messages only; remove it, or give data.messages"
    if data.long_text == "split" and forms and data.text is None:
        yield ("data", "long_text"), paths, "split is for the form text only; remove it, or give data.text"
    for name in sorted(adapter.model_fields_set - {"method"}):
        if adapter.method not in (methods := methods_of(name)):
            of = f"is of method {' and '.join(methods)}; this config's is {adapter.method}"
            yield ("adapter", name), (("adapter", "method"),), f"{of}, so remove it, or change adapter.method"
    if adapter.method == "full" and config.model.dtype in ("bfloat16", "float16"):
        hint = "leave it auto; trainer.bf16 gives bfloat16 arithmetic on float32 weights"
        yield ("model", "dtype"), (("adapter", "method"),), f"full trains float32 weights; {hint}"
    if adapter.method == "full" and config.trainer.get("fsdp"):
        hint = f"{adapter.method} trains weights of the base, so leave fsdp out, or take lora, bottleneck or prompt"
        yield ("trainer", "fsdp"), (("adapter", "method"),), f"shards a frozen base; {hint}"
    if adapter.method == "lora" and not adapter.targets and not adapter.modules:
        involved = (("adapter", "targets"), ("adapter", "modules"))
        yield (
            ("adapter", "targets"),
            involved,
            "nothing would be trained; name a role here or a module in adapter.modules",
        )
    if data.eval is None:
        for where, given in (
            (("train", "early_stopping_patience"), train.early_stopping_patience),
            (("train", "predict_with_generate"), train.predict_with_generate),
            (("data", "max_eval_examples"), data.max_eval_examples),
            (("trainer", "eval_on_start"), config.trainer.get("eval_on_start")),
            (("trainer", "eval_delay"), config.trainer.get("eval_delay")),
        ):
            if given:
                yield where, (("data", "eval"),), NEEDS_EVAL
    yield from _metric_rules(config)
    yield from _generation_rules(config)
    kwargs = config.trainer.get("lr_scheduler_kwargs", {})
    if problem := training_arguments.scheduler_problem(
        train.lr_scheduler_type, kwargs if isinstance(kwargs, dict) else {}
    ):
        at = ("trainer", "lr_scheduler_kwargs") if kwargs else ("train", "lr_scheduler_type")
        hint = "" if kwargs else ", in trainer.lr_scheduler_kwargs"
        yield at, (("train", "lr_scheduler_type"), ("trainer", "lr_scheduler_kwargs")), problem + hint


def _metric_rules(config: Config) -> Iterator[tuple[Place, tuple[Place, ...], str]]:
    """What metric_for_best_model may be."""
    data, train = config.data, config.train
    key, at, names = train.metric_for_best_model, ("train", "metric_for_best_model"), list(eval_sets(data.eval))
    found = selection_metric(key, names or [""])
    if found is None:
        metrics = dict.fromkeys(SELECTION_METRICS)
        choices = [name for set_name in ("", *names) for name in add_set_name(set_name, metrics)]
        near = nearest(key, choices)
        meant = f"did you mean {near}?" if near else f"give one of {', '.join(choices[:20])}"
        yield at, (("data", "eval"),), f"{format_value(key)} is no metric here; {meant}"
        return
    if key != "loss" and data.eval is None:
        yield at, (("data", "eval"),), f"{key} {NEEDS_EVAL}"
    if found[1] in ("accuracy", "macro_f1") and data.label_names is None:
        message = f"{found[1]} needs data.label_names, which makes eval a classification"
        yield at, (("data", "label_names"),), message
    if found[1] in TEXT_METRICS and not (train.predict_with_generate and found[1] in config.generation.metrics):
        others = (("train", "predict_with_generate"), ("generation", "metrics"))
        yield (
            at,
            others,
            f"{found[1]} is computed in training only with it in generation.metrics and predict_with_generate",
        )


def _generation_rules(config: Config) -> Iterator[tuple[Place, tuple[Place, ...], str]]:
    """What texts are generated for, and which settings mean something to which kind of decoding."""
    generation, data = config.generation, config.data
    if generation.metrics and data.text is not None:
        message = "compares with completions, or an assistant's turns; data.text has neither: leave it out"
        yield ("generation", "metrics"), (("data", "text"),), message
    if config.train.predict_with_generate and not generation.metrics:
        at, others = ("train", "predict_with_generate"), (("generation", "metrics"),)
        yield at, others, f"needs generation.metrics: some of {', '.join(TEXT_METRICS)}"
    for names, needed, there in (
        (("temperature", "top_k", "top_p"), "do_sample: true", generation.do_sample),
        (("length_penalty",), "num_beams from 2", generation.num_beams > 1),
    ):
        for name in names:
            if not there and getattr(generation, name) != GenerationConfig.model_fields[name].default:
                involved = (("generation", "do_sample"), ("generation", "num_beams"))
                yield ("generation", name), involved, f"means nothing without generation.{needed}"
