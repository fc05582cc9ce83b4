// Looks for news every few seconds and puts in place what has changed; what was opened stays open.
"use strict";
const SECONDS = 2;
const PARTS = ["progress", "tiles", "episodes", "curves"];
const shown = new Map();

function opened(part) {
  return [...part.querySelectorAll("article[id] details[open]")].map((one) => [one.closest("article").id, one.className]);
}

function put(name, fresh) {
  if (shown.get(name) === fresh.innerHTML) return;
  shown.set(name, fresh.innerHTML);
  const old = document.getElementById(name);
  const open = opened(old);
  old.replaceWith(fresh);
  for (const [id, kind] of open) {
    document.getElementById(id)?.querySelector(`details.${kind}`)?.setAttribute("open", "");
  }
}

async function look() {
  const lost = document.getElementById("lost");
  try {
    const answer = await fetch(location.href, { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.statusText);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const name of PARTS) put(name, page.getElementById(name));
    lost.hidden = true;
  } catch {
    lost.hidden = false;
  }
  setTimeout(look, SECONDS * 1000);
}

for (const select of document.querySelectorAll("select")) {
  select.addEventListener("change", () => select.form.submit());
}
setTimeout(look, SECONDS * 1000);
