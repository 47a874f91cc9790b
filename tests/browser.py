"""A headless Chromium for pages that the tests write; it resolves no host name."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

RESULT = "test-result"


def run_page(page: Path, script: str, *, timeout: int = 60) -> Any:
    """Open a page with a script at its end, and return what the script returns, by way of JSON.

    Args:
        page: An HTML file with a body.
        script: The body of an asynchronous JavaScript function.
        timeout: Seconds.
    """
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.fail(
            "expected Chromium, found none; install it with scripts/install-system-packages"
        )
    # Chromium prints the page when it has loaded, and an open document in a frame keeps it from
    # having loaded. Its virtual time would run out while pictures are decoded on other threads.
    wrapper = f"""
<script>
const held = document.createElement("iframe");
held.hidden = true;
document.body.append(held);
held.contentDocument.open();
</script>
<script type="module">
const report = document.createElement("pre");
report.id = "{RESULT}";
try {{
  report.textContent = JSON.stringify({{ result: await (async () => {{ {script} }})() }});
}} catch (error) {{
  report.textContent = JSON.stringify({{ error: String(error.stack ?? error) }});
}}
document.body.append(report);
held.contentDocument.close();
</script>
"""
    text = page.read_text(encoding="utf-8")
    assert "</body>" in text
    tested = page.with_name(f"{page.stem}-tested.html")
    tested.write_text(wrapper.join(text.rsplit("</body>", 1)) + "</body></html>", encoding="utf-8")
    done = subprocess.run(
        [
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'profile'}",
            "--window-size=1280,800", f"--timeout={1000 * timeout}", "--dump-dom",
            tested.resolve().as_uri(),
        ],
        capture_output=True, text=True, timeout=2 * timeout,
    )  # fmt: skip
    found = re.search(rf'<pre id="{RESULT}">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"{page}: the script did not end: {done.stderr[-2000:]}"
    answer = json.loads(html.unescape(found[1]))
    assert "error" not in answer, answer.get("error")
    return answer["result"]
