"""What the server counts, and its text for Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from collections import Counter
from dataclasses import dataclass, field

BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds


@dataclass
class Metrics:
    """Counts since the start, and gauges of now. The engine's thread and the server's each write their own."""

    rows: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    requests: Counter = field(default_factory=Counter)  # (model, status) -> requests
    first_tokens: Counter = field(default_factory=Counter)  # bound -> requests whose first token came within it
    first_token_seconds: float = 0.0

    def first_token(self, seconds: float) -> None:
        """Count the time from a request's arrival to its first token."""
        self.first_token_seconds += seconds
        self.first_tokens[next((bound for bound in BOUNDS if seconds <= bound), "+Inf")] += 1

    def text(self) -> str:
        """All of it."""
        lines = []
        for name, kind, help, value in (
            ("running_rows", "gauge", "Answers that are computed now.", self.rows),
            ("waiting_requests", "gauge", "Requests in the queue.", self.waiting),
            ("prompt_tokens_total", "counter", "Tokens of prompts that were read.", self.prompt_tokens),
            ("generated_tokens_total", "counter", "Tokens that were generated.", self.generated_tokens),
        ):
            lines += [f"# HELP lora_ft_{name} {help}", f"# TYPE lora_ft_{name} {kind}", f"lora_ft_{name} {value}"]
        lines += ["# HELP lora_ft_requests_total Requests by model and HTTP status."]
        lines += ["# TYPE lora_ft_requests_total counter"]
        for (model, status), count in sorted(self.requests.items()):
            lines.append(f'lora_ft_requests_total{{model="{escaped(model)}",status="{status}"}} {count}')
        name, total = "lora_ft_time_to_first_token_seconds", 0
        lines += [f"# HELP {name} Time from a request's arrival to its first token.", f"# TYPE {name} histogram"]
        for bound in (*BOUNDS, "+Inf"):
            total += self.first_tokens[bound]
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        lines += [f"{name}_sum {self.first_token_seconds:.6f}", f"{name}_count {total}"]
        return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """A label's value."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
