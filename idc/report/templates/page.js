(() => {
  const { $, make, draw } = page;
  const data = window.IDC_DATA || { systems: [], metrics: [], items: [] };
  const COLOURS = 6;
  const FIRST = 6; // cards that are filled at once, wherever they are
  const MARGIN = 700; // cards are filled when they are this close to being seen, in pixels
  const shownSystems = new Set(data.systems.keys());

  const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)}%`;
  const colour = (n) => `var(--s${n % COLOURS})`;
  const value = (item, system, metric) => item.videos[system]?.scores?.[metric]?.value;
  const failed = (item) =>
    item.videos.some((v) => v.missing || Object.values(v.scores || {}).some((s) => s.value === undefined));

  // Sorting -----------------------------------------------------------------------------------------------------
  function sortValue(row, column, words) {
    const cell = row.children[column];
    if (words) return cell.textContent.trim();
    const text = cell.dataset.value ?? cell.textContent;
    return text.trim() === "" ? NaN : parseFloat(text);
  }
  function sortBy(table, heading) {
    const body = table.tBodies[0];
    body.original ??= [...body.rows];
    const column = heading.cellIndex;
    const words = heading.classList.contains("words");
    const cycle = words ? ["ascending", "descending", "none"] : ["descending", "ascending", "none"];
    const next = cycle[(cycle.indexOf(heading.getAttribute("aria-sort")) + 1) % 3];
    for (const other of table.tHead.rows[0].cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", next);
    table.classList.toggle("sorted", next !== "none");
    const sign = next === "ascending" ? 1 : -1;
    const rows = next === "none" ? body.original : body.original.filter((row) => !row.classList.contains("group"))
      .map((row) => [sortValue(row, column, words), row])
      .sort(([a], [b]) => {
        if (words) return sign * a.localeCompare(b, undefined, { numeric: true });
        if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b); // blanks last, either way
        return sign * (a - b);
      }).map(([, row]) => row);
    body.append(...rows);
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.(".sortable thead button");
    if (button) sortBy(button.closest("table"), button.closest("th"));
  });

  // Identity ----------------------------------------------------------------------------------------------------
  function plot(identity, label) {
    const width = 320, left = 30, right = 316, top = 8, bottom = 92;
    const all = identity.tracks.flatMap((t) => t.values).filter((v) => v !== null);
    const low = Math.min(0, ...all.map((v) => Math.floor(10 * v) / 10));
    const count = Math.max(...identity.tracks.map((t) => t.values.length), 1);
    const x = (frame) => left + (right - left) * (count > 1 ? frame / (count - 1) : 0.5);
    const y = (v) => bottom - (bottom - top) * ((v - low) / (1 - low));
    const height = bottom + 6 + 5 * identity.tracks.length;
    const picture = draw("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    for (const tick of low < 0 ? [low, 0, 0.5, 1] : [0, 0.5, 1]) {
      picture.append(draw("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }));
      picture.append(draw("text", { x: left - 4, y: y(tick) + 4, "text-anchor": "end" }, tick.toFixed(1)));
    }
    identity.tracks.forEach((track, n) => {
      let path = "", pen = false;
      track.values.forEach((v, frame) => {
        if (v === null) { pen = false; return; }
        const lonely = !pen && (track.values[frame + 1] ?? null) === null;
        path += `${pen ? "L" : "M"}${x(frame).toFixed(1)} ${y(v).toFixed(1)}`;
        pen = true;
        if (lonely) picture.append(draw("circle", { cx: x(frame), cy: y(v), r: 1.8, style: `fill:${colour(n)}` }));
      });
      picture.append(draw("path", { d: path || "M0 0", style: `stroke:${colour(n)}` }));
      // Below: where the subject is seen (its colour), missing (pale) or on another's body (red).
      const step = (right - left) / count;
      track.values.forEach((v, frame) => {
        const state = track.states[frame] || (v === null ? "missing" : "seen");
        picture.append(draw("rect", {
          x: (left + step * frame).toFixed(2), y: bottom + 5 + 5 * n, width: (step * 0.98).toFixed(2), height: 3.2,
          ...(state === "swapped" ? { class: "swapped" } : { class: state, style: `fill:${colour(n)}` }),
        }));
      });
    });
    const head = draw("line", { class: "head", x1: left, x2: left, y1: top, y2: height });
    picture.append(head);
    picture.seek = (share) => { for (const end of ["x1", "x2"]) head.setAttribute(end, left + (right - left) * share); };
    return picture;
  }
  const key = (n, name) => make("span", { class: "key", style: `background:${colour(n)}`, text: String(n + 1), ...(name ? { title: name, "aria-label": name, role: "img" } : {}) });
  function confusionTable(identity) {
    const keys = identity.tracks.map((t, n) => key(n, t.name));
    const table = make("table", { class: "confusion" });
    table.append(make("caption", { text: "Rows: whose body. Columns: whom its sightings look like." }));
    const head = make("tr", {}, make("td"), ...keys.map((name) => make("th", { scope: "col" }, name)), make("th", { scope: "col", text: "none" }));
    table.append(make("thead", {}, head));
    const body = make("tbody");
    identity.confusion.forEach((row, n) => {
      const cells = row.map((share, m) => make("td", {
        text: percent(share, 0), class: n === m ? "right" : "", style: `background: rgba(var(--heat), ${(0.65 * share).toFixed(2)})`,
      }));
      body.append(make("tr", {}, make("th", { scope: "row" }, key(n, identity.tracks[n].name)), ...cells));
    });
    table.append(body);
    return table;
  }
  function identityBlock(identity, system) {
    const words = identity.tracks.map((t) => {
      const seen = t.values.filter((v) => v !== null);
      return `${t.name}: identity ${t.identity === null ? "unknown" : t.identity.toFixed(2)}, seen in ${seen.length} of ${t.values.length} frames`;
    });
    const picture = plot(identity, `Similarity over time, ${system}. ${words.join("; ")}`);
    const legend = make("ul", { class: "legend" }, ...identity.tracks.map((t, n) =>
      make("li", {}, key(n, ""), `${t.name} ${t.identity === null ? "–" : t.identity.toFixed(2)}`)));
    const block = make("div", {}, picture, legend);
    const rates = Object.entries(identity.rates).map(([name, rate]) => `${name} ${percent(rate, 0)}`).join(", ");
    if (identity.confusion.length || rates) {
      const more = make("details", {}, make("summary", { text: "Who looks like whom" }));
      if (identity.confusion.length) more.append(confusionTable(identity));
      if (rates) more.append(make("p", { class: "none", text: `Share of frames: ${rates}` }));
      block.append(more);
    }
    return [block, picture];
  }

  // Playing -----------------------------------------------------------------------------------------------------
  function player(pairs) {
    // pairs: [video, plot or null]; the longest video leads, shorter ones wait at their end, then all start again.
    const button = make("button", { type: "button", text: "▶ Play", "aria-pressed": "false" });
    const slider = make("input", { type: "range", min: "0", max: "1000", value: "0", "aria-label": "Time" });
    const box = make("div", { class: "player" }, button, slider);
    const videos = pairs.map(([video]) => video);
    let playing = false;
    const leader = () => videos.reduce((a, b) => ((b.duration || 0) > (a.duration || 0) ? b : a));
    const show = () => {
      const first = leader();
      if (first.duration) slider.value = String(Math.round(1000 * first.currentTime / first.duration));
      for (const [video, picture] of pairs) if (picture && video.duration) picture.seek(video.currentTime / video.duration);
    };
    const tick = () => {
      if (!playing) return;
      const first = leader();
      if (first.ended) for (const video of videos) { video.currentTime = 0; video.play().catch(() => {}); }
      else for (const video of videos) {
        const wanted = Math.min(first.currentTime, video.duration || 0);
        if (video !== first && !video.ended && Math.abs(video.currentTime - wanted) > 0.12) video.currentTime = wanted;
      }
      show();
      requestAnimationFrame(tick);
    };
    const set = (on) => {
      if (on === playing) return;
      playing = on;
      button.textContent = on ? "❚❚ Pause" : "▶ Play";
      button.setAttribute("aria-pressed", String(on));
      for (const video of videos) { if (on) video.play().catch(() => {}); else video.pause(); }
      if (on) requestAnimationFrame(tick);
    };
    button.addEventListener("click", () => set(!playing));
    slider.addEventListener("input", () => {
      set(false);
      const share = slider.value / 1000;
      const seek = () => {
        const time = share * (leader().duration || 0);
        for (const video of videos) if (video.duration) video.currentTime = Math.min(time, video.duration);
      };
      for (const video of videos) if (video.readyState === 0) {
        video.addEventListener("loadedmetadata", seek, { once: true });
        video.preload = "auto";
        video.load();
      }
      seek();
    });
    for (const video of videos) {
      video.addEventListener("click", () => set(!playing));
      video.addEventListener("seeked", show);
    }
    return { box, pause: () => set(false) };
  }

  // Items -------------------------------------------------------------------------------------------------------
  function chips(video, system) {
    const list = make("ul", { class: "chips" });
    const scores = Object.values(video.scores || {});
    const reasons = new Set(scores.map((score) => score.reason));
    if (scores.length > 1 && reasons.size === 1 && scores[0].value === undefined) { // said once, not by each metric
      list.append(make("li", {}, make("em", { text: scores[0].reason })));
      return list;
    }
    for (const metric of data.metrics) {
      if (!video.scores) break;
      const score = video.scores[metric.key];
      const shared = data.systems[system].shared[metric.key];
      const title = metric.title + (shared ? "†" : "");
      const chip = make("li", shared ? { title: `rewarded in training by ${shared.join(", ")}` } : {});
      chip.append(make("span", { text: title }));
      if (!score) chip.append(make("span", { text: "–", title: "does not apply to this item" }));
      else chip.append(score.value === undefined ? make("em", { text: score.reason }) : make("b", { text: percent(score.value) }));
      list.append(chip);
    }
    return list;
  }
  function fill(card, item) {
    const header = make("header", {}, make("h3", { text: item.id }));
    if (item.category) header.append(make("span", { class: "tag", text: item.category }));
    const prompt = make("p", { class: "prompt", text: item.prompt });
    prompt.addEventListener("click", () => prompt.classList.toggle("open"));
    const references = make("div", { class: "references" }, ...item.references.map((reference) => {
      const picture = reference.src
        ? make("img", { src: reference.src, alt: `Reference: ${reference.name}`, loading: "lazy" })
        : make("div", { class: "lost", text: "picture not there" });
      return make("figure", {}, picture, make("figcaption", { text: reference.name }));
    }));
    const clips = make("div", { class: "clips", tabindex: "0", role: "group", "aria-label": `Videos of ${item.id}` });
    const pairs = [];
    item.videos.forEach((video, system) => {
      const name = data.systems[system].name;
      const figure = make("figure", { "data-system": system }, make("figcaption", { class: "name", text: name }));
      figure.hidden = !shownSystems.has(system);
      let clip = null, picture = null;
      if (video.src) {
        clip = make("video", { src: video.src, preload: "none", playsinline: "", "aria-label": `${name}, ${item.id}` });
        clip.muted = true;
        if (video.poster) clip.poster = video.poster; else clip.preload = "metadata";
        figure.append(clip);
      } else figure.append(make("div", { class: "lostvideo", text: video.missing }));
      if (video.identity) {
        const [block, drawn] = identityBlock(video.identity, name);
        figure.append(block);
        picture = drawn;
      }
      figure.append(chips(video, system));
      if (clip) pairs.push([clip, picture]);
      clips.append(figure);
    });
    card.append(header, prompt);
    if (pairs.length) {
      const group = player(pairs);
      card.append(group.box);
      card.pause = group.pause;
    }
    card.append(make("div", { class: "row" }, ...(item.references.length ? [references] : []), clips));
  }
  const cards = data.items.map((item, n) => make("article", { class: "item", id: `item-${n}`, "aria-label": item.id }));
  const fillOnce = (card) => { if (!card.firstChild) fill(card, data.items[cards.indexOf(card)]); };
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) fillOnce(target);
      else if (!isIntersecting) target.pause?.();
    }
  }, { rootMargin: `${MARGIN}px` });
  $("items").append(...cards);
  cards.forEach((card) => near.observe(card));

  // Filters -----------------------------------------------------------------------------------------------------
  const option = (key, text) => make("option", { value: key, text });
  for (const category of [...new Set(data.items.map((item) => item.category))].filter(Boolean).sort()) $("category").append(option(category, category));
  $("order").append(option("", "as listed"));
  for (const { key, title } of data.metrics) {
    $("order").append(option(`low ${key}`, `${title}: lowest first`), option(`high ${key}`, `${title}: highest first`));
    if (data.systems.length > 1) $("order").append(option(`apart ${key}`, `${title}: most apart`));
    $("measure").append(option(key, title));
  }
  data.systems.forEach((system, n) => {
    const box = make("input", { type: "checkbox", value: n });
    box.checked = true;
    box.addEventListener("change", () => {
      if (box.checked) shownSystems.add(n); else shownSystems.delete(n);
      for (const figure of document.querySelectorAll(`.clips figure[data-system="${n}"]`)) figure.hidden = !box.checked;
      update();
    });
    $("systems").append(make("label", {}, box, ` ${system.name}`));
  });
  function rank(item, how, metric) {
    const values = [...shownSystems].map((system) => value(item, system, metric)).filter((v) => v !== undefined);
    if (!values.length) return Infinity;
    if (how === "low") return Math.min(...values);
    return how === "high" ? -Math.max(...values) : Math.min(...values) - Math.max(...values);
  }
  let visible = [];
  function update() {
    const query = $("query").value.trim().toLowerCase();
    const [how, metric] = $("order").value.split(" ");
    visible = data.items.map((item, n) => n).filter((n) => {
      const item = data.items[n];
      return (!query || `${item.id} ${item.prompt}`.toLowerCase().includes(query))
        && (!$("category").value || item.category === $("category").value)
        && (!$("failing").checked || failed(item));
    });
    if (how) {
      const ranks = new Map(visible.map((n) => [n, rank(data.items[n], how, metric)]));
      visible.sort((a, b) => (ranks.get(a) === ranks.get(b) ? a - b : ranks.get(a) - ranks.get(b)));
    }
    const kept = new Set(visible);
    cards.forEach((card, n) => { card.hidden = !kept.has(n); if (card.hidden) card.pause?.(); });
    $("items").append(...visible.map((n) => cards[n]));
    $("count").textContent = `${visible.length} of ${data.items.length} item${data.items.length === 1 ? "" : "s"}`;
    scores();
  }
  function scores() {
    const metric = $("measure").value;
    const systems = [...shownSystems].sort((a, b) => a - b);
    const sortable = (text, words) => make("th", { scope: "col", class: words ? "words" : "", "aria-sort": "none" }, make("button", { type: "button", text }));
    const head = make("tr", {}, sortable("Item", true), sortable("Category", true), ...systems.map((n) => sortable(data.systems[n].name, false)));
    const body = make("tbody", {}, ...visible.map((n) => {
      const item = data.items[n];
      return make("tr", {}, make("th", { scope: "row" }, make("a", { href: `#item-${n}`, text: item.id })), make("td", { class: "words", text: item.category }),
        ...systems.map((system) => {
          const score = item.videos[system].scores?.[metric];
          if (score?.value !== undefined) return make("td", { text: percent(score.value), "data-value": score.value });
          return make("td", { class: "none", "data-value": "", text: score?.reason || item.videos[system].missing || "–" });
        }));
    }));
    $("scores").replaceChildren(make("thead", {}, head), body);
  }
  for (const id of ["query", "category", "order", "failing"]) $(id).addEventListener("input", update);
  $("measure").addEventListener("input", scores);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  update();

  // Without waiting for the observer ----------------------------------------------------------------------------
  // A picture of the page may be taken before the observer's first report, however tall its window is.
  for (const [n, card] of cards.entries()) {
    if (n >= FIRST && card.getBoundingClientRect().top > innerHeight + MARGIN) break;
    fillOnce(card);
    // The page counts as loaded when these are: whoever prints it or takes its picture waits for that.
    for (const picture of card.querySelectorAll("img")) picture.loading = "eager";
    for (const clip of card.querySelectorAll("video[poster]")) new Image().src = clip.poster;
  }
  // On paper everything is in view.
  addEventListener("beforeprint", () => {
    for (const card of cards) if (!card.hidden) fillOnce(card);
    for (const picture of document.querySelectorAll(".item img")) picture.loading = "eager";
  });
})();
