"""How to use what was trained with other libraries: Python code and commands, from a run's record. Imports no torch.

A test runs each piece of code.
"""

import json
import shlex
from pathlib import Path, PurePath

from lora_ft.core.names import portable_name, template_columns
from lora_ft.core.run_folder import TEMPLATE
from lora_ft.methods.lora.peft_config import file_rank
from lora_ft.nn.expert_names import PATH


def method_of(record: dict) -> str:
    """The method of a run, from its record."""
    return record["config"]["adapter"].get("method", "lora")


def is_hub(record: dict) -> bool:
    """Whether the base came from the Hub: only then it has a revision."""
    return bool(record["base"].get("revision"))


def use(record: dict) -> str:
    """How to use what was trained, with each library that can read it."""
    match method_of(record):
        case "full":
            return (
                'With transformers, as any model: `AutoModelForCausalLM.from_pretrained("ADAPTER")`. '
                "With the prompt of its training: `lora-ft generate ADAPTER`.\n"
            )
        case "bottleneck":
            return "With lora-ft: `lora-ft generate ADAPTER`. No other library reads this format.\n"
    peft = f"""With lora-ft, in the prompt of its training: `lora-ft generate ADAPTER`. With PEFT:

```python
{peft_snippet(record, "ADAPTER")}
```
"""
    if method_of(record) == "prompt":
        return peft
    return f"""{peft}
With transformers alone (peft must be installed):

```python
{_snippet(record, "ADAPTER", "model.load_adapter('ADAPTER')")}
```

{vllm_text(record)}

Merged into the base, without any cost in inference: `lora-ft merge --adapter ADAPTER`
"""


def peft_snippet(record: dict, adapter: str) -> str:
    """Python code that loads base and adapter with PEFT and generates from a prompt of the trained form."""
    return "from peft import PeftModel\n" + _snippet(
        record, adapter, f"model = PeftModel.from_pretrained(model, {adapter!r})"
    )


def _snippet(record: dict, adapter: str, load_adapter: str) -> str:
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

{_loading(record)}
{load_adapter}
{_generation(record, adapter)}"""


def vllm_text(record: dict) -> str:
    """How to serve the adapter with vLLM; of a .gguf base vLLM can only serve the merged model."""
    base, data = record["base"], record["config"]["data"]
    if base["name"].endswith(".gguf"):
        return "vLLM serves the merged model: `lora-ft merge --adapter ADAPTER`, then `vllm serve ADAPTER-merged`."
    more = any(record["config"]["adapter"].get(s) for s in ("train_modules", "train_tokens", "add_tokens", "dora"))
    if more or any(map(PATH.fullmatch, record["slices"])):
        return "vLLM takes A and B alone: `lora-ft merge --adapter ADAPTER`, then `vllm serve ADAPTER-merged`."
    if len({entry["scaling"] for entry in record["slices"].values()}) > 1:
        return (
            "vLLM reads one rank and alpha for all modules: serve what `lora-ft export ADAPTER --to peft` writes, which "
            "computes the same."
        )
    name = " ".join(portable_name(base["name"]).split())
    options = f" --revision {base['revision']}" if is_hub(record) else ""
    if data.get("chat_template"):
        options += f" --chat-template ADAPTER/{TEMPLATE}"
    if data.get("chat_template_kwargs"):
        options += f" --default-chat-template-kwargs {shlex.quote(json.dumps(data['chat_template_kwargs']))}"
    return f"""With vLLM, where it supports LoRA on this architecture:

```
{vllm_command(name, file_rank(record["slices"]), "mine=ADAPTER", options)}
```"""


def _loading(record: dict) -> str:
    name, revision = portable_name(record["base"]["name"]), record["base"].get("revision")
    if name.endswith(".gguf"):
        file = Path(name)
        name, arguments = str(file.parent), f"base, gguf_file={file.name!r}"
        comment = "  # the folder of the .gguf file"
    else:
        arguments = f"base, revision={revision!r}" if revision else "base"
        comment = "" if revision else "  # the path of the base on your machine"
    text = f"""base = {name!r}{comment}
tokenizer = AutoTokenizer.from_pretrained({arguments})
model = AutoModelForCausalLM.from_pretrained({arguments})"""
    if new := record["config"]["adapter"].get("add_tokens"):
        text += f"""
tokenizer.add_tokens({[*new]!r})
model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings))"""
    return text


def _generation(record: dict, adapter: str) -> str:
    data = record["config"]["data"]
    if data.get("messages"):
        options = "".join(f", {name}={value!r}" for name, value in (data.get("chat_template_kwargs") or {}).items())
        file = str(PurePath(adapter, TEMPLATE))
        template = (
            f"tokenizer.chat_template = open({file!r}, encoding='utf-8').read()\n" if data.get("chat_template") else ""
        )
        inputs = f"""{template}messages = [{{"role": "user", "content": "..."}}]
options = dict(add_generation_prompt=True, return_dict=True, return_tensors="pt"{options})
inputs = tokenizer.apply_chat_template(messages, **options)"""
    else:
        braces = "  # replace what is in braces" if data.get("prompt") else ""
        if data.get("prompt") and template_columns(data.get("prompt"), optional=True):
            braces += ", and leave out what is in [[ ]] if it is empty, else its brackets"
        inputs = f'inputs = tokenizer({data.get("prompt") or "Once upon a time"!r}, return_tensors="pt"){braces}'
    return f"""{inputs}
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def vllm_command(base: str, rank: int, modules: str, options: str = "") -> str:
    """The command that serves adapters, `modules` as NAME=FOLDER, of at most `rank` on a base."""
    lora = f"--enable-lora --max-lora-rank {vllm_rank(rank)} --lora-modules {shlex.quote(modules)}"
    return f"vllm serve {shlex.quote(base)}{options} {lora}"


def vllm_rank(rank: int) -> int:
    """The smallest value of vLLM's --max-lora-rank that is at least `rank`."""
    return next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)
