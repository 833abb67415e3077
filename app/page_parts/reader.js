// The trace reader: sentence cards, and the strip above them. All text is set as text: nothing in a trace is read as HTML.

const READERS = new WeakMap();
const PAUSE = 250; // ms of rest before Python hears which sentence is meant

export default function (component) {
  const { data, parentElement, setStateValue } = component;
  let reader = READERS.get(parentElement);
  if (!reader) READERS.set(parentElement, (reader = new Reader(parentElement)));
  reader.show(data, setStateValue);
  return () => reader.rest();
}

const element = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const percent = (logprob) => `${(100 * Math.exp(logprob)).toPrecision(3)} %`;
const shown = (value) => (value === null || value === undefined ? "no value" : Number(value.toPrecision(4)).toString().replace("-", "−"));

class Reader {
  constructor(parent) {
    this.root = parent.querySelector(".reader");
    this.find = this.root.querySelector(".find");
    this.count = this.root.querySelector(".count");
    this.foldAll = this.root.querySelector(".fold-all");
    this.legend = this.root.querySelector(".legend");
    this.strip = this.root.querySelector("canvas");
    this.text = this.root.querySelector(".text");
    this.tip = this.root.querySelector(".tip");
    this.id = null;
    this.current = null;
    this.matches = [];
    this.match = -1;
    this.timers = {};
    this.root.querySelector(".before").onclick = () => this.move(-1);
    this.root.querySelector(".after").onclick = () => this.move(1);
    this.foldAll.onclick = () => this.toggleAll();
    this.find.oninput = () => this.search(this.find.value, true);
    this.find.onkeydown = (event) => this.onFind(event);
    this.text.onscroll = () => this.draw();
    this.text.onclick = (event) => this.onClick(event);
    this.text.onmousemove = (event) => this.hover(event);
    this.text.onmouseleave = this.strip.onmouseleave = () => (this.tip.hidden = !this.pinned);
    this.strip.onclick = (event) => this.onStrip(event);
    this.strip.onmousemove = (event) => this.hoverStrip(event);
    this.key = (event) => this.onKey(event);
    this.resized = new ResizeObserver(() => this.draw());
    // Tokens are made where they come near the window: of 10,000 a reader sees some hundred.
    this.near = new IntersectionObserver((seen) => this.come(seen), { root: this.text, rootMargin: "300px" });
  }

  show(data, tell) {
    this.tell = tell;
    this.data = data;
    document.removeEventListener("keydown", this.key);
    document.addEventListener("keydown", this.key);
    this.resized.observe(this.strip);
    const fresh = data.id !== this.id;
    if (fresh) this.build();
    this.colour();
    if (fresh) {
      this.current = null;
      this.find.value = data.query || "";
      this.search(this.find.value, false);
      if (data.sentence !== null) this.select(data.sentence, false);
      else this.text.scrollTop = 0;
    } else if (data.sentence !== null && data.sentence !== this.told && data.sentence !== this.current) {
      this.select(data.sentence, false);
    }
    this.told = data.sentence;
    this.draw();
  }

  rest() {
    document.removeEventListener("keydown", this.key);
    this.resized.disconnect();
  }

  // ---- text

  build() {
    this.id = this.data.id;
    this.cards = [];
    this.blocks = [];
    this.near.disconnect();
    this.unpin();
    const all = document.createDocumentFragment();
    let step = null;
    for (const [role, index, tag, number, first, count] of this.data.blocks) {
      if (number === null || step === null || step.number !== number) {
        step = element("div", "step");
        step.number = number;
        all.append(step);
      }
      step.append(this.card({ role, index, tag, first, count }));
    }
    this.text.replaceChildren(all);
    for (const made of this.text.children) {
      this.head(made);
      this.near.observe(made);
    }
  }

  begin(token) {
    return token === 0 ? 0 : this.data.ends[token - 1];
  }

  piece(token) {
    return this.data.text.slice(this.begin(token), this.data.ends[token]);
  }

  card(block) {
    const card = element("div", `card ${block.role}`);
    card.block = block;
    this.blocks.push({ ...block, card });
    if (block.index !== null) {
      card.dataset.index = block.index;
      card.id = `sentence-${block.index}`;
      this.cards[block.index] = card;
    }
    const kind = this.data.kinds[block.tag] || { label: block.role, colour: "#7A7A7A", title: block.role };
    const label = element("span", "kind", block.index === null ? kind.label : `${block.index} ${kind.label}`);
    label.title = kind.title;
    card.style.setProperty("--kind", kind.colour);
    // The white space around a sentence is space between cards already; the pointer still tells of it.
    const whole = this.data.text.slice(this.begin(block.first), this.data.ends[block.first + block.count - 1]);
    card.text = whole.trim();
    card.start = this.begin(block.first) + whole.length - whole.trimStart().length;
    card.words = element("span", "words", card.text);
    card.append(label, card.words);
    if (block.role === "prompt" && card.text.length > 700) card.classList.add("shut");
    return card;
  }

  come(seen) {
    let fresh = false;
    for (const { target, isIntersecting } of seen) {
      if (!isIntersecting) continue;
      this.near.unobserve(target);
      for (const card of target.querySelectorAll(".card")) this.split(card);
      fresh = true;
    }
    if (fresh) this.highlight();
  }

  // The words of a card token by token, coloured.
  split(card) {
    const { first, count } = card.block;
    const stop = card.start + card.text.length;
    const tokens = [];
    for (let t = first; t < first + count; t++) {
      const from = Math.min(stop, Math.max(card.start, this.begin(t)));
      const token = element("span", "t", this.data.text.slice(from, Math.max(from, Math.min(stop, this.data.ends[t]))));
      token.dataset.t = t;
      tokens.push(token);
    }
    card.words.replaceChildren(...tokens);
    card.tokens = tokens;
    this.shadeCard(card);
  }

  shadeCard(card) {
    card.tokens.forEach((token, i) => {
      const value = this.data.colour ? this.valueAt(card.block.first + i) : null;
      token.style.backgroundColor = value === null ? "" : this.shade(value);
    });
  }

  // The block that holds a token.
  owner(token) {
    let [low, high] = [0, this.blocks.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.blocks[middle].first <= token) low = middle;
      else high = middle - 1;
    }
    return this.blocks[low];
  }

  // A step of several sentences (and a long prompt) can be shut to its first line.
  head(step) {
    const cards = [...step.children];
    const long = cards.length > 1 || cards[0].classList.contains("shut");
    if (!long) return;
    const fold = element("button", "fold");
    fold.type = "button";
    fold.onclick = (event) => {
      event.stopPropagation();
      this.toggle(step);
    };
    step.prepend(fold);
    step.foldable = true;
    const shut = cards[0].classList.contains("shut");
    cards[0].classList.remove("shut");
    this.toggle(step, shut);
  }

  toggle(step, shut = !step.classList.contains("shut")) {
    if (!step.foldable) return;
    step.classList.toggle("shut", shut);
    const n = step.querySelectorAll(".card").length;
    const fold = step.querySelector(".fold");
    const what = n > 1 ? `${n} sentences` : "the prompt";
    fold.textContent = shut ? `▸ ${what}` : "▾";
    fold.title = shut ? `unfold ${what}` : `fold ${what}`;
    fold.setAttribute("aria-expanded", String(!shut));
    this.draw();
  }

  toggleAll() {
    const steps = [...this.text.children].filter((step) => step.foldable);
    const shut = steps.some((step) => !step.classList.contains("shut"));
    steps.forEach((step) => this.toggle(step, shut));
    this.foldAll.textContent = shut ? "Unfold all" : "Fold all";
  }

  // ---- colour

  valueAt(token) {
    const colour = this.data.colour;
    if (!colour) return null;
    if (colour.per === "token") return colour.values[token] ?? null;
    const { index } = this.owner(token);
    return index === null ? null : (colour.values[index] ?? null);
  }

  shade(value) {
    const { low, high } = this.data.colour;
    const dark = this.data.dark;
    if (low < 0 && high > 0) {
      const part = Math.max(-1, Math.min(1, value / Math.max(-low, high)));
      return `rgba(${part > 0 ? (dark ? "86,180,233" : "0,114,178") : "230,159,0"},${(Math.abs(part) * 0.65).toFixed(2)})`;
    }
    const part = Math.max(0, Math.min(1, (value - low) / (high - low)));
    return `rgba(${dark ? "86,180,233" : "0,114,178"},${(part * 0.6).toFixed(2)})`;
  }

  colour() {
    const colour = this.data.colour;
    const painted = colour ? JSON.stringify([colour.title, colour.about, this.data.dark]) : "";
    if (painted !== this.painted || this.paintedId !== this.id) {
      for (const { card } of this.blocks) if (card.tokens) this.shadeCard(card);
      this.painted = painted;
      this.paintedId = this.id;
    }
    const legend = document.createDocumentFragment();
    if (colour) {
      const bar = element("span", "bar");
      const at = (part) => this.shade(colour.low + part * (colour.high - colour.low));
      bar.style.background = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map(at).join(",")})`;
      legend.append(`${colour.title}: ${shown(colour.low)} `, bar, ` ${shown(colour.high)} ${colour.unit}`);
      if (colour.null) legend.append(element("span", "band", "grey: chance"));
      if (colour.marks.length) legend.append(element("span", "band", "▼ peak"));
      legend.append(element("span", "about", colour.about));
    }
    for (const [tag, kind] of Object.entries(this.data.kinds)) {
      if (!this.blocks.some((block) => block.tag === tag)) continue;
      const chip = element("span", "chip", kind.label);
      chip.title = kind.title;
      chip.style.setProperty("--kind", kind.colour);
      legend.append(chip);
    }
    this.legend.replaceChildren(legend);
  }

  // ---- choosing

  select(index, tell = true) {
    const card = this.cards[index];
    if (!card) return;
    if (this.current !== null) this.cards[this.current].removeAttribute("aria-current");
    this.current = index;
    card.setAttribute("aria-current", "true");
    const step = card.parentElement;
    if (step.classList.contains("shut") && step.querySelector(".card") !== card) this.toggle(step, false);
    const box = card.getBoundingClientRect();
    const view = this.text.getBoundingClientRect();
    if (box.top < view.top + 8 || box.bottom > view.bottom - 8)
      this.text.scrollTop += box.top - view.top - view.height / 3;
    this.draw();
    if (tell) this.later("sentence", index);
  }

  later(name, value) {
    clearTimeout(this.timers[name]);
    this.timers[name] = setTimeout(() => {
      if (name === "sentence") this.told = value;
      this.tell(name, value);
    }, PAUSE);
  }

  move(by) {
    const last = this.cards.length - 1;
    if (last < 0) return;
    let next = this.current === null ? (by > 0 ? 0 : last) : this.current + by;
    while (next >= 0 && next <= last && !this.cards[next]) next += by; // a sentence without a token has no card
    this.select(next);
  }

  onClick(event) {
    const card = event.target.closest(".card");
    if (!card || String(getSelection())) return;
    const token = event.target.closest(".t");
    if (token && this.pinned !== token) this.pin(token, event);
    else this.unpin();
    if (card.dataset.index !== undefined) this.select(Number(card.dataset.index));
  }

  // A token that was clicked keeps its values in sight, on a screen without a pointer too.
  pin(token, event) {
    this.unpin();
    this.say(Number(token.dataset.t), event);
    this.pinned = token;
    token.classList.add("pinned");
  }

  unpin() {
    this.pinned?.classList.remove("pinned");
    this.pinned = null;
    this.tip.hidden = true;
  }

  onKey(event) {
    const target = event.composedPath()[0];
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (target instanceof HTMLElement && target.closest("input, textarea, select, button, [contenteditable=true], [role=combobox]")) return;
    if (event.key === "j" || event.key === "k") this.move(event.key === "j" ? 1 : -1);
    else if (event.key === "/") this.find.focus();
    else if (event.key === "Escape" && this.pinned) this.unpin();
    else if (event.key === "Enter" && this.current !== null) this.toggle(this.cards[this.current].parentElement);
    else return;
    event.preventDefault();
  }

  // ---- search

  search(words, tell) {
    const wanted = words.trim().toLowerCase();
    this.wanted = wanted;
    this.matches = [];
    for (const { card } of this.blocks) {
      const found = wanted !== "" && card.text.toLowerCase().includes(wanted);
      card.classList.toggle("found", found);
      if (found) this.matches.push(card);
    }
    this.highlight();
    this.match = -1;
    this.count.textContent = wanted ? `${this.matches.length} found` : "";
    this.draw();
    if (tell) this.later("query", words.trim());
  }

  // The words that were found, in the cards that are near the window.
  highlight() {
    if (!globalThis.Highlight) return;
    const near = this.matches.filter((card) => card.tokens);
    const ranges = near.map((card) => {
      const at = card.text.toLowerCase().indexOf(this.wanted);
      return rangeIn(card, at, at + this.wanted.length);
    });
    CSS.highlights.set("reasonscope-found", new Highlight(...ranges.filter(Boolean)));
  }

  onFind(event) {
    if (event.key === "Escape") this.find.blur();
    else if (event.key === "Enter" && this.matches.length) {
      const n = this.matches.length;
      this.match = (this.match + (event.shiftKey ? n - 1 : 1)) % n;
      this.count.textContent = `${this.match + 1} of ${n}`;
      const card = this.matches[this.match];
      if (card.dataset.index !== undefined) this.select(Number(card.dataset.index));
      else {
        this.toggle(card.parentElement, false);
        card.scrollIntoView({ block: "nearest" });
      }
    } else return;
    event.preventDefault();
  }

  // ---- the strip

  get length() {
    return this.data.ends.length || 1;
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.paint());
  }

  paint() {
    const ratio = globalThis.devicePixelRatio || 1;
    const width = this.strip.clientWidth;
    const height = this.strip.clientHeight;
    if (!width || !this.data) return;
    this.strip.width = width * ratio;
    this.strip.height = height * ratio;
    const pen = this.strip.getContext("2d");
    pen.scale(ratio, ratio);
    const floor = height - 12;
    const x = (token) => (token / this.length) * width;
    for (const { tag, first, count } of this.blocks) {
      const kind = this.data.kinds[tag];
      pen.fillStyle = kind ? kind.colour : "rgba(128,128,128,0.35)";
      pen.fillRect(x(first), floor + 2, Math.max(1, x(first + count) - x(first) - 0.5), 10);
    }
    this.paintValues(pen, x, floor);
    this.paintPlace(pen, x, height);
  }

  paintValues(pen, x, floor) {
    const colour = this.data.colour;
    if (!colour) return;
    const top = 8;
    const y = (v) => floor - ((Math.max(colour.low, Math.min(colour.high, v)) - colour.low) / (colour.high - colour.low)) * (floor - top);
    const n = this.length;
    const bins = Math.max(1, Math.min(n, Math.floor(this.strip.clientWidth / 2)));
    const lines = { value: [], low: [], high: [] };
    for (let b = 0; b < bins; b++) {
      const from = Math.floor((b * n) / bins);
      const to = Math.max(from + 1, Math.floor(((b + 1) * n) / bins));
      let best = null; // the highest of a bin is drawn: a mean would hide a peak of one token
      let [low, high] = [null, null];
      for (let t = from; t < to; t++) {
        const v = this.valueAt(t);
        if (v !== null && (best === null || v > best)) best = v;
        if (colour.null && colour.per === "token" && colour.null[0][t] !== null) {
          low = low === null ? colour.null[0][t] : Math.min(low, colour.null[0][t]);
          high = high === null ? colour.null[1][t] : Math.max(high, colour.null[1][t]);
        }
      }
      const at = x((from + to) / 2);
      lines.value.push(best === null ? null : [at, y(best)]); // nothing joins what stands on both sides of an unmeasured place
      if (low !== null) lines.low.push([at, y(low)]), lines.high.push([at, y(high)]);
    }
    if (lines.low.length) {
      pen.fillStyle = "rgba(128,128,128,0.3)";
      pen.beginPath();
      [...lines.high, ...lines.low.reverse()].forEach(([a, b], i) => (i ? pen.lineTo(a, b) : pen.moveTo(a, b)));
      pen.fill();
    }
    pen.strokeStyle = this.data.dark ? "#56B4E9" : "#0072B2";
    pen.lineWidth = 1.2;
    pen.lineCap = "round";
    pen.beginPath();
    lines.value.forEach((place, i) => {
      if (!place) return;
      if (!lines.value[i - 1]) pen.moveTo(...place);
      pen.lineTo(...place);
    });
    pen.stroke();
    pen.fillStyle = "#D55E00";
    for (const mark of colour.marks) {
      const at = x(this.tokenOf(mark) + 0.5);
      pen.beginPath();
      pen.moveTo(at - 4, 0), pen.lineTo(at + 4, 0), pen.lineTo(at, 7);
      pen.fill();
    }
  }

  tokenOf(place) {
    return this.data.colour.per === "token" ? place : (this.cards[place]?.block.first ?? 0);
  }

  paintPlace(pen, x, height) {
    const view = this.text.getBoundingClientRect();
    let [first, last] = [null, null];
    // Step by step: to measure a card in a step that the browser has not laid out yet would make it lay out all of them.
    const seen = [...this.text.children].filter((step) => {
      const box = step.getBoundingClientRect();
      return box.bottom >= view.top && box.top <= view.bottom;
    });
    for (const card of seen.flatMap((step) => [...step.querySelectorAll(".card")])) {
      const box = card.getBoundingClientRect();
      if (!box.height || box.bottom < view.top || box.top > view.bottom) continue;
      first ??= card.block.first;
      last = card.block.first + card.block.count - 1;
    }
    if (first !== null) {
      pen.fillStyle = "rgba(128,128,128,0.14)";
      pen.fillRect(x(first), 0, x(last + 1) - x(first), height);
    }
    pen.strokeStyle = getComputedStyle(this.strip).color;
    pen.lineWidth = 1.5;
    if (this.current !== null) {
      const { first: from, count } = this.cards[this.current].block;
      pen.strokeRect(x(from), 0.75, Math.max(2, x(from + count) - x(from)), height - 1.5);
    }
    pen.fillStyle = "#D55E00";
    for (const card of this.matches) pen.fillRect(x(card.block.first), height - 3, 3, 3);
  }

  tokenAt(event) {
    const box = this.strip.getBoundingClientRect();
    const token = Math.floor(((event.clientX - box.left) / box.width) * this.length);
    const reach = (6 / box.width) * this.length;
    const marks = (this.data.colour?.marks || []).map((mark) => this.tokenOf(mark));
    const near = marks.filter((mark) => Math.abs(mark - token) <= reach);
    return near.length ? near.reduce((a, b) => (Math.abs(a - token) < Math.abs(b - token) ? a : b)) : token;
  }

  onStrip(event) {
    const { card } = this.owner(this.tokenAt(event));
    if (card.dataset.index !== undefined) this.select(Number(card.dataset.index));
    else card.scrollIntoView({ block: "nearest" });
  }

  // ---- hover

  hover(event) {
    if (this.pinned) return;
    const token = event.target.closest(".t");
    if (!token) return (this.tip.hidden = true);
    this.say(Number(token.dataset.t), event);
  }

  hoverStrip(event) {
    this.unpin();
    this.say(Math.min(this.length - 1, this.tokenAt(event)), event);
  }

  say(token, event) {
    const { colour, alternatives: other } = this.data;
    const lines = [this.data.tokenised ? `token ${token} ${JSON.stringify(this.piece(token))}` : `piece ${token}`];
    if (colour) {
      lines.push(`${colour.title}: ${shown(this.valueAt(token))} ${colour.unit}`);
      const place = colour.per === "token" ? token : this.owner(token).index;
      if (colour.null && colour.null[0][place] != null)
        lines.push(`chance: ${shown(colour.null[0][place])} to ${shown(colour.null[1][place])}`);
    }
    const row = other ? token - other.first : -1;
    if (row >= 0 && row < other.said.length) {
      lines.push(`it was written with ${percent(other.said[row])}; the likeliest here:`);
      for (let k = row * other.top; k < (row + 1) * other.top; k++)
        lines.push(`${percent(other.logprobs[k])}  ${JSON.stringify(other.pieces[other.ids[k]])}`);
    }
    this.tip.textContent = lines.join("\n");
    this.tip.hidden = false;
    const box = this.root.getBoundingClientRect();
    const left = Math.min(event.clientX - box.left + 12, box.width - this.tip.offsetWidth - 4);
    this.tip.style.transform = `translate(${Math.max(0, left)}px, ${event.clientY - box.top + 16}px)`;
  }
}

// The range of characters [start, stop) of a card's words.
function rangeIn(card, start, stop) {
  const range = document.createRange();
  let at = 0;
  let begun = false;
  for (const token of card.tokens) {
    const node = token.firstChild;
    if (!node) continue;
    const end = at + node.length;
    if (!begun && start < end) range.setStart(node, start - at), (begun = true);
    if (begun && stop <= end) {
      range.setEnd(node, stop - at);
      return range;
    }
    at = end;
  }
  return null;
}
