"""samples/web in Chromium: golden vectors, a swap, the slider, a blend, and every error."""

import json
import os
import subprocess

import pytest
from npm_packages import node_without_python

from loraport.runtime import Runtime, Sampling, TextGenerator

PROMPT = "The harbour keeps its light on"
TOKENS = 16
SELECTIONS = {
    "base": None,
    "a": {"a": 1.0},
    "b=0.5": {"b": 0.5},
    "b=0.5 a=1": {"b": 0.5, "a": 1.0},
}


@pytest.fixture(scope="module")
def texts(bundle):
    """What the Python runtime says."""
    python = TextGenerator(Runtime(bundle))
    return {
        name: python.generate(PROMPT, selection, Sampling(max_new_tokens=TOKENS))
        for name, selection in SELECTIONS.items()
    }


@pytest.mark.parametrize("file", ["page.test.js", "faults.test.js"])
def test_the_page(web_sample, chromium, bundle, texts, tmp_path, file):
    environment = {
        **node_without_python(tmp_path),
        "CHROMIUM": chromium,
        "LORAPORT_BUNDLE": str(bundle),
        "LORAPORT_TEXTS": json.dumps({"prompt": PROMPT, "tokens": TOKENS, "texts": texts}),
    }
    if "SCREENSHOTS" in os.environ:
        environment["SCREENSHOTS"] = os.environ["SCREENSHOTS"]
    done = subprocess.run(
        ["node", "--test", f"test/{file}"],
        cwd=web_sample,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "# fail 0" in done.stdout
    assert "# skipped 0" in done.stdout


def test_a_bundle_link_may_not_leave_what_is_served(web_sample, tmp_path):
    """The server is for trying things out, yet serves nothing but its folder."""
    probe = """
      import { spawn } from 'node:child_process';
      import { once } from 'node:events';
      import { request } from 'node:http';
      const server = spawn(process.execPath, ['serve.mjs', '.', '0']);
      const { port } = new URL(String((await once(server.stdout, 'data'))[0]).trim());
      for (const path of ['/index.html', '/', '/../secret', '/%2e%2e/secret', '/..%2fsecret']) {
        const [response] = await once(request({ port, path }).end(), 'response');
        console.log(path, response.statusCode);
        response.resume();
      }
      server.kill();
    """
    (web_sample.parent / "secret").write_text("secret")
    done = subprocess.run(
        ["node", "--input-type=module", "-e", probe],
        cwd=web_sample,
        env=node_without_python(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes = [line.rsplit(" ", 1)[1] for line in done.stdout.splitlines()]
    assert codes == ["200", "200", "404", "404", "404"]
