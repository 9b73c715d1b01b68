// Elements, numbers and text of runs, for the views of pages. Text of a run is put into text nodes alone.
(function () {
  "use strict";

  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u00a0\u00ad\u061c\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udfff]|[\u{e0000}-\u{e007f}]/u;
  const PIECES = new RegExp("(\\n| |\\t|" + HIDDEN.source + ")", "u");
  const HTML = new Set("P,BR,HR,EM,STRONG,S,CODE,PRE,BLOCKQUOTE,UL,OL,LI,TABLE,THEAD,TBODY,TR,TD,SPAN".split(","));
  const MATHML = new Set(("math,mrow,mi,mn,mo,mtext,mspace,mstyle,mpadded,mphantom,menclose,mfrac,msqrt,mroot,msub,msup," +
    "msubsup,munder,mover,munderover,mtable,mtr,mtd,mmultiscripts,mprescripts,none").split(","));
  const LEFT_OUT = new Set(["href", "src", "id", "name", "style"]);

  function h(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "class") element.className = value;
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
    return element;
  }

  const short = (value) => (typeof value === "number" ? String(Number(value.toPrecision(3))).replace("-", "−") : String(value));
  const exact = (value) => String(typeof value === "number" ? Number(value.toPrecision(7)) : value).replace(/^-/, "−");
  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  function codePoint(character) {
    return "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  }

  // A text as nodes, with chips for hidden characters. `marks`: mark line ends; `white`: mark spaces and tabs.
  function textNodes(text, marks, white) {
    if (!HIDDEN.test(text) && !(marks && text.includes("\n")) && !(white && /[ \t]/.test(text))) return [text];
    return text.split(PIECES).filter((piece) => piece !== "" && piece !== undefined).map((piece) => {
      if (piece === "\n") return marks ? h("span", { class: "nl" }, "\n") : "\n";
      if (piece === " ") return white ? h("span", { class: "ws sp" }, " ") : " ";
      if (piece === "\t") return white ? h("span", { class: "ws tab" }, "\t") : "\t";
      return HIDDEN.test(piece) && [...piece].length === 1 ? h("span", { class: "chip" }, codePoint(piece)) : piece;
    });
  }

  const plain = (text) => h("span", {}, textNodes(String(text)));
  const quoted = (text) => JSON.stringify(text).replace(new RegExp(HIDDEN.source, "gu"), (found) => `⟨${codePoint(found)}⟩`);

  function copied(node) {
    if (node.nodeType === Node.TEXT_NODE) return document.createTextNode(node.data);
    if (node.nodeType !== Node.ELEMENT_NODE) return null;
    const mathml = MATHML.has(node.localName);
    if (!mathml && !HTML.has(node.tagName)) return document.createTextNode(node.textContent);
    const copy = mathml ? document.createElementNS("http://www.w3.org/1998/Math/MathML", node.localName) : document.createElement(node.localName);
    for (const { name, value } of node.attributes) {
      if (!name.startsWith("on") && !name.includes(":") && !LEFT_OUT.has(name)) copy.setAttribute(name, value);
    }
    if (node.style && node.style.textAlign) copy.style.textAlign = node.style.textAlign;
    for (const child of node.childNodes) { const inner = copied(child); if (inner) copy.append(inner); }
    return copy;
  }

  // The nodes of HTML that rendering.py wrote: its elements and attributes, whatever else it has.
  function rendered(html) {
    return [...new DOMParser().parseFromString(html, "text/html").body.childNodes].map(copied).filter(Boolean);
  }

  async function copy(text, button) {
    let done = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch (_) { // no clipboard on a page from a file, or from an address that is not secure
      const field = h("textarea", { class: "visually-hidden", "aria-hidden": "true" });
      field.value = text;
      document.body.append(field);
      field.select();
      done = document.execCommand("copy");
      field.remove();
      button.focus();
    }
    const words = button.textContent;
    button.textContent = done ? "Copied" : "Not copied: select it by hand";
    setTimeout(() => { button.textContent = words; }, 1500);
  }

  function copyButton(words, name, text) {
    const button = h("button", { type: "button", class: "button small", "aria-label": name }, words);
    button.addEventListener("click", () => copy(text(), button));
    return button;
  }

  // A place on this page, to which a link leads whose address must stay.
  function reach(id) {
    const place = document.getElementById(id);
    if (place) { place.scrollIntoView(); place.focus({ preventScroll: true }); }
  }

  window.gruppo = window.gruppo || {};
  window.gruppo.text = { h, short, exact, plural, textNodes, plain, quoted, rendered, copyButton, reach };
})();
