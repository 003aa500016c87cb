"""The studio's files: served, safe, whole, and in step with each other."""

from __future__ import annotations

import re

import httpx
import pytest

from services.gateway.routes.studio import FOLDER, TYPES
from tests.fixtures.gateways import wav


@pytest.mark.parametrize("path", ["/", *(f"/studio/{name}" for name in TYPES)])
def test_every_file_is_served_with_a_policy_that_allows_nothing_foreign(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_names_the_files_that_are_served_and_no_other_host() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert set(sources) == {"index.html", *TYPES}
    for name, source in sources.items():
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", source), name
        assert set(re.findall(r"/studio/([\w.]+)", source)) <= set(TYPES), name
    assert not re.search(r"\son\w+=|style=", sources["index.html"])
    assert not [name for name, source in sources.items() if "innerHTML" in source]


def test_every_element_that_the_script_asks_for_is_on_the_page() -> None:
    page, *scripts = ((FOLDER / name).read_text(encoding="utf-8") for name in ("index.html", "studio.js", "voices.js"))
    on_page = set(re.findall(r'\bid="([\w-]+)"', page))
    for script in scripts:
        assert set(re.findall(r'\$\("([\w-]+)"\)', script)) <= on_page


def test_every_field_has_a_name_for_those_who_cannot_see_it() -> None:
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    labelled = set(re.findall(r'<label[^>]*\bfor="([\w-]+)"', page))
    for tag in re.findall(r"<(?:input|textarea|select)\b[^>]*>", page):
        identity = re.search(r'\bid="([\w-]+)"', tag)
        assert identity
        inside = re.search(rf"<label>[^<]*<[^>]*\bid=\"{identity[1]}\"", page)
        assert identity[1] in labelled or inside, tag
    assert '<html lang="en">' in page
    assert 'role="alert"' in page
    assert 'role="status"' in page


def test_the_fields_that_the_script_sends_are_fields_of_the_api(client: httpx.Client) -> None:
    script = (FOLDER / "studio.js").read_text(encoding="utf-8")
    block = script[script.index("const fields = {") : script.index("for (const [name, value]")]
    sent = set(re.findall(r'^ {4}"?([\w.]+)"?:', block, re.MULTILINE))
    content = client.get("/openapi.json").json()["paths"]["/v1/audio/edits"]["post"]["requestBody"]["content"]
    known = set(content["application/json"]["schema"]["properties"])
    assert len(sent) >= 8
    assert {name.split(".")[0] for name in sent} <= known


def test_a_voice_is_stored_with_the_consent_that_the_page_asks_for(client: httpx.Client) -> None:
    script, page = ((FOLDER / name).read_text(encoding="utf-8") for name in ("voices.js", "index.html"))
    block = script[script.index("const parts = {") : script.index("for (const [field, value]")]
    sent = set(re.findall(r"^ {6}(\w+):", block, re.MULTILINE))
    assert sent == {"name", "text", "consent_statement", "consent_by"}
    statement = re.search(r'id="consent-statement">([^<]+)<', page)
    assert statement
    body = {"name": "Studio", "text": "Hello.", "consent_statement": statement[1], "consent_by": "Ada L."}
    answer = client.post("/v1/audio/voices", files={"audio": ("a.wav", wav(), "audio/wav")}, data=body)
    assert answer.status_code == 201, answer.text
    assert answer.json()["consent"]["statement"] == statement[1]
    edit = {"type": "denoise", "voice": answer.json()["id"]}
    assert client.post("/v1/audio/edits", json=edit, headers={"prefer": "wait=20"}).json()["status"] == "done"
    assert client.delete(f"/v1/audio/voices/{answer.json()['id']}").status_code == 204
