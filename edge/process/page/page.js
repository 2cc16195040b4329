"use strict";
// Shows /status.json and follows /status/events. Text goes into the page as text only: some of it comes from upstreams.

const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let latest = null;
let paused = false;

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// --- how numbers and times are written

const whole = (value) => (value === null ? "–" : value.toLocaleString("en"));
const milliseconds = (value) => (value === null ? "–" : value >= 1000 ? `${(value / 1000).toFixed(1)} s` : `${Math.round(value)} ms`);

function bytes(value) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (value >= size) return `${(value / size).toFixed(1)} ${unit}`;
  }
  return `${value} B`;
}

function span(seconds) {
  const steps = [["d", 86400], ["h", 3600], ["min", 60]];
  for (const [unit, size] of steps) {
    if (seconds >= size) return `${Math.floor(seconds / size)} ${unit}`;
  }
  return `${Math.max(Math.floor(seconds), 0)} s`;
}

function moment(unixSeconds) {
  const date = new Date(unixSeconds * 1000).toISOString();
  return make("time", { datetime: date, title: date }, `${span(latest.time - unixSeconds)} ago`);
}

// --- plots and tables

function plot(values, text) {
  const most = Math.max(...values, 1e-9);
  const draw = (value, at) => (values[at - 1] ?? null) === null ? `M${at},${height(value)} h0.5` : `L${at},${height(value)}`;
  const height = (value) => (20 - (18 * value) / most).toFixed(1);
  const steps = values.map((value, at) => (value === null ? "" : draw(value, at)));  // a second without any is a gap
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "plot");
  svg.setAttribute("viewBox", "0 0 59 22");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", text);
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", steps.join(" "));
  svg.append(path);
  return svg;
}

function table(caption, columns, rows) {
  // Roles are stated, since on a small screen the table is laid out as blocks, and browsers then take it for none.
  const head = make("tr", { role: "row" });
  for (const [name, kind] of columns) {
    head.append(make("th", { role: "columnheader", scope: "col", class: kind ?? "" }, name));
  }
  const body = make("tbody", { role: "rowgroup" });
  for (const cells of rows) {
    const row = make("tr", { role: "row" });
    cells.forEach((cell, at) => {
      const [label, kind] = columns[at];
      const content = Array.isArray(cell) ? cell : [cell];
      row.append(
        at === 0
          ? make("th", { role: "rowheader", scope: "row" }, ...content)
          : make("td", { role: "cell", class: kind ?? "", "data-label": label }, ...content),
      );
    });
    body.append(row);
  }
  const thead = make("thead", { role: "rowgroup" }, head);
  return make("table", { role: "table" }, make("caption", {}, caption), thead, body);
}

function show(id, ...content) {
  byId(id).replaceChildren(...content.filter((each) => each !== null));
}

const more = (count, what) => (count ? make("p", { class: "soft" }, `${count} more ${what} are quiet and not shown.`) : null);
const mark = (kind, text) => make("span", { class: kind }, `${{ good: "✓", warn: "!", bad: "✗" }[kind]} ${text}`);
const SEVERITY = { error: "bad", warning: "warn" };

// --- the sections

function showHead(status) {
  const config = status.config;
  byId("version").textContent = status.version;
  const kind = status.ready ? "good" : "bad";
  const word = status.stage === "running" ? (status.ready ? "ready" : "not ready") : status.stage;
  const state = byId("state");
  if (state.dataset.word !== word) {
    state.dataset.word = word;
    state.replaceChildren(mark(kind, word));
  }
  byId("about").textContent =
    `up ${span(status.time - status.started_at)} · process ${status.pid} · generation ${config.generation}, loaded ` +
    `${span(status.time - config.loaded_at)} ago · routes.toml ${config.sha256.slice(0, 12)}`;
  document.title = `edge: ${word}${status.troubles.length ? `, ${status.troubles.length} troubles` : ""}`;
}

function showTroubles(status) {
  const list = byId("troubles");
  const texts = status.troubles.map((each) => each.what);
  if (list.dataset.shown === JSON.stringify(texts)) return; // else a screen reader would read them out each second
  list.dataset.shown = JSON.stringify(texts);
  const items = status.troubles.map((each) => make("li", {}, mark(SEVERITY[each.severity], each.what)));
  list.replaceChildren(...(items.length ? items : [make("li", {}, mark("good", "none"))]));
}

function showMinute(status) {
  const { minute, now } = status;
  const tiles = [
    ["Requests", whole(minute.requests)],
    ["Failed", whole(minute.failed)],
    ["Refused", whole(minute.refused)],
    ["First byte, half within", milliseconds(minute.ttft_p50_ms)],
    ["First byte, 95 % within", milliseconds(minute.ttft_p95_ms)],
    ["Tokens a second", whole(minute.tokens_per_s)],
    ["In flight now", whole(now.in_flight)],
    ["Connections", `${whole(now.connections)} of ${whole(now.max_connections)}`],
    ["Bodies in memory", `${bytes(now.body_bytes)} of ${bytes(now.max_body_bytes)}`],
  ];
  show("minute", ...tiles.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function withPlot(text, route, key, what) {
  if (!route.series) return text;
  const values = route.series[key];
  if (values.every((value) => value === null)) return text;
  return [text, plot(values, `${route.name}: ${what} in each second of the last minute, at most ${Math.max(...values)}`)];
}

function showRoutes(status) {
  const columns = [
    ["Route"], ["Pool"], ["Requests", "number"], ["Failed", "number"], ["Refused", "number"],
    ["First byte, 50 % and 95 %", "number"], ["Tokens a second", "number"],
  ];
  const rows = status.routes.map((route) => [
    route.name,
    route.pool,
    withPlot(whole(route.requests), route, "requests", "requests"),
    route.failed ? mark("bad", whole(route.failed)) : "0",
    whole(route.refused),
    withPlot(`${milliseconds(route.ttft_p50_ms)}, ${milliseconds(route.ttft_p95_ms)}`, route, "ttft_ms", "milliseconds to the first byte"),
    withPlot(whole(route.tokens_per_s), route, "tokens", "tokens of ended requests"),
  ]);
  show("routes", table("Requests that ended within the last minute.", columns, rows), more(status.routes_more, "routes"));
}

function stateOf(member) {
  const kind = member.state === "healthy" ? "good" : member.state === "ejected" || member.state.startsWith("fails") ? "bad" : "warn";
  const again = member.back_in_s === null ? "" : `, tried again in ${span(member.back_in_s)}`;
  return mark(kind, member.state + again);
}

function showPools(status) {
  const columns = [
    ["Endpoint"], ["State"], ["Why", "text"], ["Since"], ["In flight", "number"], ["Requests", "number"], ["Errors", "number"],
    ["First byte, 50 % and 95 %", "number"],
  ];
  const sections = status.pools.map((pool) => {
    const rows = pool.members.map((member) => [
      member.endpoint,
      stateOf(member),
      member.last_request_id ? [member.why, " ", make("span", { class: "id soft" }, member.last_request_id)] : member.why,
      member.since === null ? "the start" : moment(member.since),
      member.max_in_flight === null ? whole(member.in_flight) : `${whole(member.in_flight)} of ${whole(member.max_in_flight)}`,
      whole(member.requests),
      member.errors ? mark("bad", whole(member.errors)) : "0",
      `${milliseconds(member.ttft_p50_ms)}, ${milliseconds(member.ttft_p95_ms)}`,
    ]);
    const facts = [pool.engine, pool.balance, pool.dns ? `dns ${pool.dns}` : "", pool.queue ? `${pool.waiting} of ${pool.queue} wait` : ""];
    const caption = `${facts.filter(Boolean).join(" · ")} · ${pool.out} of ${pool.members_count} out · ${pool.in_flight} in flight`;
    return make("div", {}, make("h3", {}, pool.name), table(caption, columns, rows), ...[more(pool.members_more, "members")].filter(Boolean));
  });
  show("pools", ...sections, more(status.pools_more, "pools"));
}

function showLimits(status) {
  const columns = [["User or key"], ["Limit"], ["Route"], ["Used"], ["Share"]];
  const rows = status.limits.map((near) => [
    near.whom, near.limit, near.route, `${whole(near.used)} of ${whole(near.allowed)} ${near.what}`,
    [make("meter", { min: 0, max: 1, high: 0.8, value: near.share, "aria-label": `share that ${near.whom} has used` }), ` ${Math.round(near.share * 100)} %`],
  ]);
  show("limits", rows.length ? table("In the sliding minute, the day or the month; looked at every five seconds.", columns, rows) : make("p", { class: "soft" }, "Nobody has used any of a limit."));
}

function showParts(status) {
  const rows = status.parts.map((part) => [
    part.name,
    part.up ? mark("good", "ok") : mark("bad", "down"),
    part.why,
    Object.entries(part.facts).map(([name, value]) => `${name.replaceAll("_", " ")} ${whole(value)}`).join(" · "),
  ]);
  for (const certificate of status.certificates) {
    const left = certificate.ends_at - status.time;
    const kind = left <= 0 ? "bad" : left < 14 * 86400 ? "warn" : "good";
    const ends = new Date(certificate.ends_at * 1000).toISOString().slice(0, 16).replace("T", " ");
    const word = left <= 0 ? `ended ${span(-left)} ago` : `ends in ${span(left)}`;
    rows.push([`certificate of ${certificate.of}`, mark(kind, word), "", [...certificate.names, `until ${ends} UTC`].join(" · ")]);
  }
  show("parts", table("What the edge needs beside the models' servers.", [["Part"], ["State"], ["Why"], ["Since the start"]], rows));
}

function showFailures(status) {
  const columns = [["When"], ["Request"], ["Route"], ["Endpoint"], ["Status", "number"], ["How it ended"], ["Upstream", "text"], ["Took", "number"]];
  const rows = status.failures.map((each) => [
    moment(each.at),
    make("span", { class: "id" }, each.request_id),
    each.route,
    each.endpoint,
    each.status ? String(each.status) : "",
    [each.end, each.error && each.error !== each.end ? ` (${each.error})` : "", each.retries ? `, retried ${each.retries} times` : ""].join(""),
    [each.upstream_status ? `${each.upstream_status} ` : "", each.upstream_error].join(""),
    milliseconds(each.duration_s * 1000),
  ]);
  show("failures", rows.length ? table("The latest first. The access log has the rest by the request's id.", columns, rows) : make("p", { class: "soft" }, "None since the start."));
}

function render(status) {
  latest = status;
  for (const part of [showHead, showTroubles, showMinute, showRoutes, showPools, showLimits, showParts, showFailures]) part(status);
}

// --- follow

function lost() {
  const state = byId("state");
  state.dataset.word = "";
  state.replaceChildren(mark("bad", "no connection to the edge, trying again"));
}

const events = new EventSource("/status/events");
events.onmessage = (event) => {
  if (!paused) render(JSON.parse(event.data));
};
events.onerror = lost;

byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
});
