"""The studio's files: served, safe, whole, and in step with each other."""

from __future__ import annotations

import re

import httpx
import pytest

from services.gateway.routes.studio import FOLDER, TYPES


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
    assert "innerHTML" not in sources["studio.js"]


def test_every_element_that_the_script_asks_for_is_on_the_page() -> None:
    page, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("index.html", "studio.js"))
    on_page = set(re.findall(r'\bid="([\w-]+)"', page))
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
