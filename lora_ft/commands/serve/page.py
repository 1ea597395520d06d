"""The page at /, to talk to two models side by side: one file, which may load nothing from elsewhere."""

import hashlib
import re
from base64 import b64encode
from pathlib import Path

from starlette.responses import HTMLResponse, Response


def page() -> Response:
    """The page. Its policy allows no script and no style but its own, by their hashes, and no frame around it."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    script, style = (_hash(re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[0]) for tag in ("script", "style"))
    policy = f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:"
    policy += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return HTMLResponse(text, headers={"content-security-policy": policy, "cache-control": "no-cache"})


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
