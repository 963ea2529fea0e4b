(() => {
  const { $, make, draw } = page;
  const data = window.IDC_DATA || { total: 0, part: 1, samples: [], drops: [], reasons: [] };
  const PAGE = 48; // cards at a time
  const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]; // Okabe and Ito
  const NONE = "\u0000none"; // an option for what says nothing; no text of the data is equal to it
  const colour = (n) => COLOURS[n % COLOURS.length];
  const counted = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
  const shown = (value) => (Number.isInteger(value) ? String(value) : Number(value.toPrecision(4)).toString());

  // Rows: samples, then drops. An anchor is a row's place in the address: its key where that is one row's alone.
  const rows = [
    ...data.samples.map((s, place) => ({ ...s, place, text: [s.caption, s.id, s.source, s.video, ...s.subjects].join("\n").toLowerCase() })),
    ...data.drops.map((d) => ({
      ...d, dropped: true, id: d.key || d.video, scores: {}, subjects: [], pictured: 0, origins: [], kinds: [],
      text: Object.values(d).join("\n").toLowerCase(),
    })),
  ];
  const times = new Map();
  for (const row of rows) times.set(row.key, (times.get(row.key) || 0) + 1);
  rows.forEach((row, n) => {
    row.number = n;
    row.anchor = row.key && times.get(row.key) === 1 ? row.key : row.dropped ? `drop-${n - data.samples.length}` : row.id;
  });
  const byAnchor = new Map(rows.map((row) => [row.anchor, row]));

  // Details, in files of some samples each ------------------------------------------------------------------------
  const parts = new Map(), arrived = new Map();
  window.IDC_PART = (number, details) => arrived.set(number, details);
  function part(number) {
    if (!parts.has(number)) parts.set(number, new Promise((resolve, reject) => {
      const script = make("script", { src: `parts/${String(number).padStart(5, "0")}.js` });
      script.addEventListener("load", () => resolve(arrived.get(number)));
      script.addEventListener("error", () => reject(new Error(`parts/${number} is not there`)));
      document.head.append(script);
    }));
    return parts.get(number);
  }
  const details = async (row) => (await part(Math.floor(row.place / data.part)))[row.place % data.part];

  // Filters -------------------------------------------------------------------------------------------------------
  const unique = (values) => [...new Set(values)].sort((a, b) => String(a).localeCompare(String(b), "en", { numeric: true }));
  const option = (value, text) => make("option", { value, text });
  function choices(id, values, texts = (value) => (value === NONE ? "not said" : String(value))) {
    $(id).append(option("", "all"), ...values.map((value) => option(value, texts(value))));
    $(id).closest("label").hidden = values.length < 2;
  }
  const said = (values) => unique(values.map((value) => value || NONE));
  const kept = rows.filter((row) => !row.dropped), dropped = rows.filter((row) => row.dropped);
  const reasonOf = (row) => [row.step, row.reason].filter(Boolean).join(": ");
  choices("status", dropped.length && kept.length ? ["kept", "dropped"] : []);
  choices("reason", unique(dropped.map(reasonOf)));
  $("reason").closest("label").hidden = !dropped.length;
  choices("split", said(kept.map((row) => row.split)));
  choices("source", said(rows.map((row) => row.source)));
  choices("category", said(kept.map((row) => row.category)));
  choices("licence", said(kept.map((row) => row.licence)));
  choices("number", unique(kept.map((row) => row.pictured)));
  choices("kind", unique(kept.flatMap((row) => row.kinds)));
  choices("origin", unique(kept.flatMap((row) => row.origins)));
  const scores = unique(kept.flatMap((row) => Object.keys(row.scores)));
  $("score").append(option("", "any"), ...scores.map((name) => option(name, name)));
  $("range").hidden = !scores.length;
  const ranges = new Map(scores.map((name) => {
    const values = kept.map((row) => row.scores[name]).filter((value) => value !== undefined);
    return [name, [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))]];
  }));
  const by = (a, b) => (a === b ? 0 : a === undefined ? 1 : b === undefined ? -1 : a - b); // undefined comes last
  const negative = (value) => (value === undefined ? undefined : -value);
  const orders = {
    "": ["as they lie", () => 0],
    key: ["key", (a, b) => a.id.localeCompare(b.id, "en", { numeric: true })],
    short: ["shortest first", (a, b) => by(a.seconds, b.seconds)],
    long: ["longest first", (a, b) => by(b.seconds, a.seconds)],
    many: ["most pictured subjects first", (a, b) => b.pictured - a.pictured],
    words: ["longest caption first", (a, b) => by(b.words, a.words)],
  };
  for (const name of scores) {
    orders[`low ${name}`] = [`${name}: lowest first`, (a, b) => by(a.scores[name], b.scores[name])];
    orders[`high ${name}`] = [`${name}: highest first`, (a, b) => by(negative(a.scores[name]), negative(b.scores[name]))];
  }
  $("order").append(...Object.entries(orders).map(([value, [text]]) => option(value, text)));

  let visible = rows, first = 0;
  function update() {
    const wanted = Object.fromEntries(["status", "reason", "split", "source", "category", "licence", "number", "kind", "origin", "score"].map((id) => [id, $(id).value]));
    const query = $("query").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const least = parseFloat($("least").value), most = parseFloat($("most").value);
    const same = (choice, value) => !choice || (value || NONE) === choice;
    visible = rows.filter((row) => {
      if (wanted.status && (wanted.status === "dropped") !== Boolean(row.dropped)) return false;
      if (wanted.reason && !(row.dropped && reasonOf(row) === wanted.reason)) return false;
      for (const name of ["split", "category", "licence"]) if (wanted[name] && (row.dropped || !same(wanted[name], row[name]))) return false;
      if (!same(wanted.source, row.source)) return false;
      if (wanted.number && (row.dropped || String(row.pictured) !== wanted.number)) return false;
      if (wanted.kind && !row.kinds.includes(wanted.kind)) return false;
      if (wanted.origin && !row.origins.includes(wanted.origin)) return false;
      if (wanted.score) {
        const value = row.scores[wanted.score];
        if (value === undefined || value < least || value > most) return false;
      }
      return query.every((word) => row.text.includes(word));
    });
    if ($("order").value) visible = [...visible].sort(orders[$("order").value][1]);
    first = 0;
    list();
  }

  // Cards ---------------------------------------------------------------------------------------------------------
  const people = ({ pictured, subjects: { length } }) => (pictured < length ? `${pictured} of ${counted(length, "subject")} pictured` : counted(pictured, "subject"));
  const address = (row) => `#${encodeURIComponent(row.anchor)}`;
  function card(row) {
    const picture = make("div", { class: "picture" });
    if (row.dropped) picture.append(make("span", { text: row.reason || "dropped" }));
    else if (row.frame) picture.append(make("img", { src: row.frame, alt: `Frame of ${row.key}`, loading: "lazy", decoding: "async" }));
    else picture.append(make("span", { text: row.missing || "no picture" }));
    const tags = make("div", { class: "tags" });
    const tag = (text, kind = "") => text && tags.append(make("span", { class: `tag ${kind}`, text }));
    tag(row.source);
    if (row.dropped) tag(row.step ? `dropped by ${row.step}` : "dropped", "bad");
    else for (const text of [row.category, row.frames === 1 ? "still" : `${row.seconds.toFixed(1)} s`, people(row)]) tag(text);
    if (row.missing) tag("unreadable", "bad");
    const text = make("div", { class: "text" },
      make("div", { class: "caption", text: row.dropped ? row.detail || row.reason : row.caption || "no caption" }),
      make("div", { class: "key", text: row.id || "–" }), tags);
    const link = make("a", { class: `card${row.dropped ? " dropped" : ""}`, href: address(row), "aria-label": row.id || row.reason }, picture, text);
    return make("li", {}, link);
  }
  const drops = data.reasons.reduce((sum, reason) => sum + reason.count, 0);
  const tally = (seen, all, total, noun) => all && // "146 of 500 samples (chosen from 548)", 0 for none
    (seen === all ? "" : `${seen.toLocaleString("en")} of `) + counted(all, noun) + (total > all ? ` (chosen from ${total.toLocaleString("en")})` : "");
  function list() {
    $("cards").replaceChildren(...visible.slice(first, first + PAGE).map(card));
    const end = Math.min(first + PAGE, visible.length);
    $("place").textContent = `${first + 1}–${end} of ${visible.length.toLocaleString("en")}`;
    $("pager").hidden = visible.length <= PAGE;
    $("first").disabled = $("back").disabled = first === 0;
    $("next").disabled = $("last").disabled = end === visible.length;
    $("nothing").hidden = visible.length > 0;
    $("nothing").textContent = rows.length ? "Nothing is like that; clear some of the filters." : "There are no samples here.";
    const seen = visible.filter((row) => !row.dropped).length;
    const counts = [tally(seen, kept.length, data.total, "sample"), tally(visible.length - seen, dropped.length, drops, "drop")];
    $("count").textContent = counts.filter(Boolean).join(", ") || "nothing to show";
  }
  const lastPage = () => Math.max(0, Math.floor((visible.length - 1) / PAGE) * PAGE);
  function turn(to) {
    first = Math.min(Math.max(to, 0), lastPage());
    list();
    scrollTo(0, 0);
  }
  const turns = { first: () => 0, back: () => first - PAGE, next: () => first + PAGE, last: lastPage };
  for (const [id, to] of Object.entries(turns)) $(id).addEventListener("click", () => turn(to()));

  let hidden = false; // masks and boxes, of this sample and the next
  // One sample ----------------------------------------------------------------------------------------------------
  function mask({ name, mask: { width, height, runs } }, rgb) {
    const canvas = make("canvas", { class: "over mask", width, height, role: "img", "aria-label": `Mask of ${name}` });
    const context = canvas.getContext("2d");
    const pixels = context.getImageData(0, 0, width, height);
    let place = 0, inside = false;
    for (const run of runs) {
      if (inside) for (let n = place; n < place + run; n += 1) pixels.data.set([...rgb, 255], 4 * n);
      place += run;
      inside = !inside;
    }
    context.putImageData(pixels, 0, 0);
    return canvas;
  }
  const rgb = (hex) => [1, 3, 5].map((n) => parseInt(hex.slice(n, n + 2), 16));
  function stage(row, told) {
    const box = make("div", { class: "stage", style: `aspect-ratio: ${told.width} / ${told.height}; max-width: min(100%, calc(68vh * ${told.width / told.height}))` });
    const video = told.clip ? make("video", { src: told.clip, poster: row.frame, preload: "metadata", playsinline: "", "aria-label": `Clip of ${row.key}` }) : null;
    if (video) {
      video.muted = video.loop = true;
      box.append(video);
    } else if (row.frame) box.append(make("img", { src: row.frame, alt: `Picture of ${row.key}: ${row.caption}` }));
    else box.append(make("div", { class: "lost", text: row.missing || "no clip" }));
    const boxes = draw("svg", { class: "over", viewBox: `0 0 ${told.width} ${told.height}`, preserveAspectRatio: "none", role: "img" });
    const labels = [];
    told.subjects.forEach((subject, n) => {
      if (subject.frame !== told.shown) return;
      if (subject.mask) {
        box.append(mask(subject, rgb(colour(n))));
      }
      if (subject.box) {
        const [left, top, right, bottom] = subject.box;
        boxes.append(draw("rect", { x: left, y: top, width: right - left, height: bottom - top, style: `stroke:${colour(n)}` }));
        const place = `left:${100 * Math.max(0, left) / told.width}%;top:${100 * Math.max(0, top) / told.height}%;background:${colour(n)}`;
        labels.push(make("span", { class: "over label", style: place, text: subject.name || `subject ${n + 1}` }));
      }
    });
    boxes.setAttribute("aria-label", `Boxes of ${told.subjects.filter((s) => s.box).map((s) => s.name).join(", ") || "nothing"}`);
    if (boxes.childNodes.length) box.append(boxes, ...labels);
    const drawn = box.querySelector(".over");
    if (video && drawn) { // masks and boxes are those of one frame
      let started = false;
      const where = () => box.classList.toggle("elsewhere", started && Math.abs(video.currentTime * told.fps - told.shown) > 1);
      video.addEventListener("play", () => { started = true; where(); });
      for (const event of ["timeupdate", "seeked", "pause"]) video.addEventListener(event, () => { started ||= video.currentTime > 0; where(); });
    }
    const controls = make("div", { class: "controls" });
    if (video) {
      const play = make("button", { type: "button", id: "play", text: "Play" });
      const toggle = () => (video.paused ? video.play().catch(() => {}) : video.pause());
      play.addEventListener("click", toggle);
      video.addEventListener("click", toggle);
      for (const event of ["play", "pause"]) video.addEventListener(event, () => { play.textContent = video.paused ? "Play" : "Pause"; });
      const slider = make("input", { type: "range", min: 0, max: 1000, value: 0, "aria-label": "Time" });
      slider.addEventListener("input", () => { if (video.duration) { video.pause(); video.currentTime = video.duration * slider.value / 1000; } });
      video.addEventListener("timeupdate", () => { if (video.duration && !slider.matches(":active")) slider.value = Math.round(1000 * video.currentTime / video.duration); });
      const annotated = make("button", { type: "button", text: "Annotated frame" });
      annotated.addEventListener("click", () => { video.pause(); video.currentTime = (told.shown + 0.5) / told.fps; });
      video.addEventListener("error", () => box.append(make("div", { class: "lost", text: "this browser cannot play the clip" })));
      controls.append(play, slider, ...(drawn && told.shown ? [annotated] : []));
    }
    if (drawn) {
      const check = make("input", { type: "checkbox", id: "over" });
      check.checked = !hidden;
      check.addEventListener("change", () => { hidden = !check.checked; box.classList.toggle("bare", hidden); });
      box.classList.toggle("bare", hidden);
      controls.append(make("label", {}, check, " masks and boxes"));
    }
    return [box, controls];
  }
  function highlighted(caption, names) {
    const found = [];
    names.forEach((name, n) => {
      if (!name) return;
      const words = name.toLowerCase(), text = caption.toLowerCase();
      if (text.length !== caption.length) return; // a letter whose lower case is longer: places would not fit
      for (let at = text.indexOf(words); at >= 0; at = text.indexOf(words, at + 1)) {
        const around = `${text[at - 1] || " "}${text[at + words.length] || " "}`;
        if (!/[\p{L}\p{N}]/u.test(around)) found.push([at, at + words.length, n]);
      }
    });
    found.sort((a, b) => a[0] - b[0] || b[1] - a[1]);
    const pieces = [];
    let end = 0;
    for (const [from, to, n] of found) {
      if (from < end) continue; // within a longer name
      pieces.push(caption.slice(end, from), make("mark", { style: `--c:${colour(n)}`, text: caption.slice(from, to), title: `subject ${n + 1}` }));
      end = to;
    }
    return [...pieces, caption.slice(end)];
  }
  function reference(subject, told) {
    const picture = told.src ? make("img", { src: told.src, alt: `Reference of ${subject.name || "a subject"}`, loading: "lazy" })
      : told.pictured ? make("div", { class: "lost", text: "picture not readable" }) : null;
    const words = [told.origin === "augmented" ? "augmented: a copy, moved and tinted" : told.origin.replaceAll("_", " ") || "origin not said"];
    if (told.similarity !== null) words.push(`similarity ${told.similarity.toFixed(3)}${/^(augmented|generated)/.test(told.origin) ? " to what it was made of" : ""}`);
    if (told.seconds !== null) words.push(`at ${shown(told.seconds)} s`);
    if (told.video) words.push(`of ${told.video}`);
    if (!picture) words.push("not in the sample");
    return make("figure", { class: "reference" }, ...(picture ? [picture] : []), make("figcaption", { text: words.join(" · ") }));
  }
  function subjects(told) {
    return make("ul", { class: "subjects" }, ...told.subjects.map((subject, n) => {
      const words = [subject.kind, subject.score ? `score ${shown(subject.score)}` : "", subject.mask ? "mask" : "", subject.box ? "box" : "", subject.frame ? `frame ${subject.frame}` : ""];
      const item = make("li", { style: `--c:${colour(n)}` }, make("b", { text: subject.name || `subject ${n + 1}` }),
        make("p", { class: "told", text: words.filter(Boolean).join(" · ") }), ...subject.references.map((r) => reference(subject, r)), ...(subject.references.length ? [] : [make("p", { class: "told", text: "no picture" })]));
      const more = { ...subject.details, ...Object.fromEntries(subject.references.filter((r) => Object.keys(r.details).length).map((r, k) => [`reference ${k + 1}`, r.details])) };
      if (Object.keys(more).length) item.append(folded("more", more));
      return item;
    }));
  }
  const folded = (title, value) => make("details", {}, make("summary", { text: title }), make("pre", { text: JSON.stringify(value, null, 1) }));
  function scoreTable(row) {
    return make("table", { class: "scores" }, make("tbody", {}, ...Object.entries(row.scores).map(([name, value]) => {
      const [low, high] = ranges.get(name);
      const mark = make("i", { style: `left:${high > low ? 100 * (value - low) / (high - low) : 50}%` });
      const scale = make("div", { class: "scale", role: "img", "aria-label": `of ${shown(low)} to ${shown(high)}`, title: `${shown(low)} to ${shown(high)} on this page` }, mark);
      return make("tr", {}, make("th", { scope: "row", text: name }), make("td", { text: shown(value) }), make("td", { class: "where" }, scale));
    })));
  }
  function known(pairs) {
    return make("dl", { class: "known" }, ...pairs.filter(([, value]) => value !== "" && value !== undefined)
      .flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { text: String(value) })]));
  }
  const panel = (title, ...content) => make("section", { class: "panel" }, make("h3", { text: title }), ...content);
  const flat = (values) => Object.entries(values).map(([name, value]) => [name, typeof value === "object" ? JSON.stringify(value) : value]);

  function head(row) {
    const at = visible.indexOf(row);
    const step = (text, label, to) => {
      const button = make("button", { type: "button", text, "aria-label": label });
      button.disabled = !to;
      button.addEventListener("click", () => go(to));
      return button;
    };
    const place = make("span", { text: at < 0 ? "not among those shown" : `${at + 1} of ${visible.length.toLocaleString("en")}` });
    const words = row.dropped ? ["dropped"] : [row.source, row.category, row.split].filter(Boolean);
    const tags = words.map((text) => make("span", { class: row.dropped ? "tag bad" : "tag", text }));
    const back = make("a", { class: "back", href: "#", text: "← all samples" });
    back.addEventListener("click", (event) => { event.preventDefault(); go(null); });
    return make("header", {}, back, make("h2", { text: row.id || row.reason }), ...tags,
      make("div", { class: "steps" }, step("←", "Sample before", visible[at - 1]), place, step("→", "Sample after", visible[at + 1])));
  }
  let current = null;
  async function show(row) {
    current = row;
    $("browse").hidden = true;
    const one = $("one");
    one.hidden = false;
    one.querySelector("video")?.pause();
    if (row.dropped) {
      one.replaceChildren(head(row), panel("Dropped", known([["step", row.step], ["reason", row.reason], ["detail", row.detail], ["source", row.source], ["video", row.video], ["key", row.key]])));
    } else {
      one.setAttribute("aria-busy", "true");
      let told;
      try { told = await details(row); } catch (error) {
        if (current === row) one.replaceChildren(head(row), make("p", { class: "empty", text: error.message }));
        return;
      }
      if (current !== row) return; // somebody has leafed on meanwhile
      one.removeAttribute("aria-busy");
      one.replaceChildren(head(row), whole(row, told));
      for (const other of [visible[visible.indexOf(row) + 1], visible[visible.indexOf(row) - 1]]) // ahead of the next key
        if (other && !other.dropped) { part(Math.floor(other.place / data.part)).catch(() => {}); if (other.frame) new Image().src = other.frame; }
    }
    one.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  function whole(row, told) {
    const left = make("div", {}), right = make("div", {});
    left.append(make("section", { class: "panel" }, ...stage(row, told)));
    if (told.worse) {
      const clip = make("video", { src: told.worse, controls: "", preload: "metadata", playsinline: "", style: "width:100%", "aria-label": `Worse clip of ${row.key}` });
      left.append(panel("The worse clip of the pair", clip));
    }
    const caption = row.caption ? make("p", { class: "caption whole" }, ...highlighted(row.caption, told.subjects.map((s) => s.name)))
      : make("p", { class: "empty", text: "no caption" });
    left.append(panel("Caption", caption));
    right.append(panel(told.subjects.length ? "Subjects and references" : "No subjects", subjects(told)));
    if (Object.keys(row.scores).length) right.append(panel("Scores", scoreTable(row)));
    const size = `${row.size}, ${row.frames === 1 ? "a still picture" : `${row.frames} frames at ${shown(told.fps)} a second`}`;
    right.append(panel("Where it comes from", known([
      ["source", row.source], ["video", row.video], ["licence", row.licence || "not said"], ["split", row.split], ["clip", size],
      ["words", row.words], ["problem", row.missing], ["shard", told.shard], ["sha256", told.sha256],
    ])));
    for (const name of ["safety", "models"]) if (Object.keys(told[name]).length) right.append(panel(name[0].toUpperCase() + name.slice(1), known(flat(told[name]))));
    if (Object.keys(told.meta).length) right.append(make("section", { class: "panel" }, folded("All else that is known", told.meta)));
    return make("div", { class: "columns" }, left, right);
  }
  function browse() {
    const row = current;
    current = null;
    $("one").replaceChildren();
    $("one").hidden = true;
    $("browse").hidden = false;
    const at = row ? visible.indexOf(row) : -1;
    if (at >= 0 && (at < first || at >= first + PAGE)) { first = Math.floor(at / PAGE) * PAGE; list(); }
    if (at >= 0) { const link = $("cards").children[at - first].firstChild; link.focus({ preventScroll: true }); link.scrollIntoView({ block: "nearest" }); }
  }

  // The address and the keys --------------------------------------------------------------------------------------
  function go(row) {
    const hash = row ? address(row) : "#";
    if (location.hash === hash) route(); else location.hash = hash;
  }
  function route() {
    let anchor = location.hash.slice(1);
    try { anchor = decodeURIComponent(anchor); } catch { /* an address that somebody cut: taken as it is */ }
    const row = anchor && byAnchor.get(anchor);
    if (row) show(row); else browse();
  }
  addEventListener("hashchange", route);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, select, textarea")) return;
    const leaf = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (leaf && current) {
      const at = visible.indexOf(current), to = at < 0 ? visible[0] : visible[at + leaf];
      if (to) go(to);
    } else if (leaf && !$("pager").hidden) turn(first + leaf * PAGE);
    else if (event.key === "Escape" && current) go(null);
    else if (event.key === " " && current && !event.target.closest?.("button, a, summary")) $("play")?.click();
    else if (event.key === "m" && current) $("over")?.click();
    else if (event.key === "/" && !current) $("query").focus();
    else return;
    event.preventDefault();
  });
  $("skip").addEventListener("click", (event) => { event.preventDefault(); ($("cards").querySelector("a") || $("one")).focus(); });
  $("filters").addEventListener("input", update);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("reset", () => setTimeout(update));

  // What was dropped ----------------------------------------------------------------------------------------------
  if (data.reasons.length) {
    const fewer = data.drops.length < drops ? `, ${data.drops.length.toLocaleString("en")} of them on this page` : "";
    $("reasons").hidden = false;
    $("reasons").querySelector("summary").textContent = `${drops.toLocaleString("en")} dropped${fewer}: why`;
    $("reasons").querySelector("tbody").append(...data.reasons.map((reason) => {
      const button = make("button", { type: "button", text: reason.reason || "no reason given" });
      button.addEventListener("click", () => { $("filters").reset(); $("reason").value = reasonOf(reason); setTimeout(update); });
      return make("tr", {}, make("td", { text: reason.step }), make("td", {}, button), make("td", { class: "n", text: reason.count.toLocaleString("en") }));
    }));
  }
  list();
  route();
})();
