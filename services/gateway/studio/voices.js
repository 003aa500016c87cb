// Stored voices: the list to choose from, keeping the recording as one with its speaker's consent, and deleting.
// Knows nothing about edits.

const $ = (id) => document.getElementById(id);

function option(value, text) {
  return Object.assign(document.createElement("option"), { value, textContent: text });
}

/** The part of the form about voices. `call` asks the gateway, `recording` gives what was chosen, `changed` is told. */
export function voices({ call, recording, changed }) {
  let stored = [];

  const chosen = () => stored.find((voice) => voice.id === $("voice").value) ?? null;

  async function refresh(id = "") {
    stored = (await (await call("/v1/audio/voices")).json()).data;
    const none = option("", stored.length ? "None: the recording above" : "None stored yet");
    $("voice").replaceChildren(none, ...stored.map((voice) => option(voice.id, `${voice.name}, ${voice.duration_s.toFixed(1)} s`)));
    choose(id);
  }

  function choose(id) {
    $("voice").value = id;
    $("voice").disabled = !stored.length;
    $("forget").hidden = !chosen();
    changed();
  }

  function lack() {
    if (!recording()) return ["Choose or record a recording first.", "file"];
    if (!$("text").value.trim()) return ["Write down what the recording says.", "text"];
    if (!$("voice-name").value.trim()) return ["Give the voice a name.", "voice-name"];
    if (!$("consent").checked) return ["A voice is stored only with its speaker's consent.", "consent"];
    if (!$("consent-by").value.trim()) return ["Write who attests the consent.", "consent-by"];
    return null;
  }

  async function keep() {
    const missing = lack();
    if (missing) {
      $("kept").textContent = missing[0];
      $(missing[1]).focus();
      return;
    }
    const { blob, name } = recording(), form = new FormData();
    const parts = {
      name: $("voice-name").value.trim(),
      text: $("text").value.trim(),
      consent_statement: $("consent-statement").textContent.trim(),
      consent_by: $("consent-by").value.trim(),
    };
    for (const [field, value] of Object.entries(parts)) form.append(field, value);
    form.append("audio", blob, name);
    $("keep").disabled = true;
    try {
      const voice = await (await call("/v1/audio/voices", { method: "POST", body: form })).json();
      $("kept").textContent = `${voice.name} is stored, with the consent that ${voice.consent.by} attested.`;
      $("voice-name").value = "";
      $("consent").checked = false;
      await refresh(voice.id);
    } catch (error) {
      $("kept").textContent = error.message;
    }
    $("keep").disabled = false;
  }

  async function forget() {
    const voice = chosen();
    try {
      await call(`/v1/audio/voices/${voice.id}`, { method: "DELETE" });
      $("kept").textContent = `${voice.name} is deleted, with its recording and consent.`;
      await refresh();
    } catch (error) {
      $("kept").textContent = error.message;
    }
  }

  $("voice").addEventListener("change", () => choose($("voice").value));
  $("keep").addEventListener("click", keep);
  $("forget").addEventListener("click", forget);
  return { chosen, choose, refresh };
}
