
"use strict";
for (const section of document.querySelectorAll("[data-caption]")) {
  const tokens = [...section.querySelectorAll("button.t")];
  const inspector = section.querySelector(".inspector");
  const data = section.querySelector("script.mass");
  const mass = data ? JSON.parse(data.textContent) : null;
  const frames = section.querySelector(".frames");
  const cursor = section.querySelector(".heat .cursor");
  let chosen = null;

  const perCent = (share) => `${(100 * share).toFixed(1).replace(/\.0$/, "")} %`;

  function look(token) {
    const row = mass && mass[Number(token.dataset.i)];
    if (!row) return;
    const largest = Number(frames.dataset.largest);
    const known = row.every((share) => share !== null);
    section.querySelector(".frame-subject").textContent = known
      ? `For “${token.querySelector(".s").textContent}”.`
      : "Not known for the first token.";
    [...frames.children].forEach((frame, i) => {
      frame.querySelector(".m i").style.width = known ? `${(100 * row[i]) / largest}%` : "0";
      frame.querySelector(".mt").textContent = known ? perCent(row[i]) : "–";
      frame.classList.toggle("most", known && row[i] === Math.max(...row));
    });
    cursor.hidden = false;
    cursor.style.left = `${(100 * Number(token.dataset.i)) / mass.length}%`;
    cursor.style.width = `${100 / mass.length}%`;
  }

  function choose(token) {
    if (token === chosen) return;
    if (chosen) {
      chosen.classList.remove("chosen");
      chosen.tabIndex = -1;
    }
    chosen = token;
    token.classList.add("chosen");
    token.tabIndex = 0;
    const detail = document.getElementById(token.getAttribute("aria-describedby")).cloneNode(true);
    detail.removeAttribute("id");
    inspector.replaceChildren(detail);
    look(token);
  }

  // One stop for Tab; the arrow keys go from word to word.
  tokens.forEach((token, i) => {
    token.tabIndex = i ? -1 : 0;
    token.addEventListener("focus", () => choose(token));
    token.addEventListener("click", () => choose(token));
    token.addEventListener("pointerenter", (event) => {
      if (event.pointerType === "mouse") choose(token);
    });
    token.addEventListener("keydown", (event) => {
      const to = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1,
                   Home: 0, End: tokens.length - 1 }[event.key];
      if (to === undefined || !tokens[to]) return;
      event.preventDefault();
      tokens[to].focus();
    });
  });
}
