// Shows the states that the server streams. All of it is text, never markup.
"use strict";
const token = new URLSearchParams(location.search).get("token");
const at = (id) => document.getElementById(id);
const colours = ["#3366cc", "#dc3912", "#ff9900", "#109618", "#990099", "#0099c6",
                 "#dd4477", "#66aa00", "#b82e2e", "#316395"];
let compiled = null;

function list(id, rows) {
  at(id).replaceChildren(...rows.map((row) => {
    const item = document.createElement("li");
    item.textContent = row;
    return item;
  }));
}

function draw(curves) {
  const drawn = Object.entries(curves).filter(([, c]) => c.points.length > 1);
  const all = drawn.flatMap(([, c]) => c.points);
  const low = (k) => Math.min(...all.map((p) => p[k]));
  const high = (k) => Math.max(...all.map((p) => p[k]));
  const [x0, x1, y0, y1] = all.length ? [low(0), high(0), low(1), high(1)] : [0, 1, 0, 1];
  const line = ([run, curve], i) => {
    const shape = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    shape.setAttribute("points", curve.points.map(([x, y]) =>
      `${10 + 580 * (x - x0) / (x1 - x0 || 1)},${210 - 200 * (y - y0) / (y1 - y0 || 1)}`
    ).join(" "));
    shape.setAttribute("fill", "none");
    shape.setAttribute("stroke", colours[i % colours.length]);
    shape.setAttribute("stroke-width", "1.5");
    shape.setAttribute("vector-effect", "non-scaling-stroke");
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = run;
    shape.append(title);
    return shape;
  };
  at("curves").replaceChildren(...drawn.map(line));
  list("runs", Object.entries(curves).map(([run, c]) => {
    const last = c.points.at(-1);
    return `${run} ${c.status}${last ? `, step ${last[0]}: ${last[1].toPrecision(4)}` : ""}`;
  }));
}

function show(now) {
  at("question").textContent = now.question;
  document.title = `${now.state}: ${now.question}`;
  const who = now.active && now.state === "running" ? `, at work: ${now.active.agent}` : "";
  const end = now.ending && now.state !== "running"
    ? ` (${now.ending.status}, ${now.ending.code}): ${now.ending.why}` : "";
  at("state").textContent = now.state + who + end;
  if (now.last === undefined) return;
  const used = now.usage;
  at("usage").textContent = `${used.requests} requests, ${used.tokens_in + used.tokens_out} `
    + `tokens, ${used.usd.toFixed(4)} USD, ${used.wall.toFixed(0)} s, `
    + `${(used.disk / 1e6).toFixed(1)} MB`;
  const turns = at("turns"), below = turns.scrollHeight - turns.scrollTop - turns.clientHeight;
  list("turns", now.last);
  if (below < 40) turns.scrollTop = turns.scrollHeight;
  at("metric").textContent = now.metric;
  draw(now.curves);
  at("plan").textContent = now.plan ? JSON.stringify(now.plan, null, 1) : "none yet";
  list("said", now.said.map((m) => `${m.text} — ${m.answer || "not read yet"}`));
  list("sessions", now.sessions.map((s) =>
    `${s.agent}: ${s.task.slice(0, 120)} (${s.status || "at work"}, ${s.turns} turns)`));
  list("findings", Object.entries(now.findings).map(([g, f]) => `${g}: ${f.join("; ")}`));
  at("waits").replaceChildren(...now.waits_for.map((target) => {
    const item = document.createElement("li");
    item.append(`waits for your word on ${target} `);
    for (const command of ["approve", "deny"]) {
      const button = document.createElement("button");
      button.textContent = command;
      button.onclick = () => send(command, "", target);
      item.append(button);
    }
    return item;
  }));
  if (now.paper && now.paper !== compiled) {
    compiled = now.paper;
    const frame = document.createElement("iframe");
    frame.title = "paper";
    frame.src = `/paper.pdf?token=${encodeURIComponent(token)}&at=${compiled}`;
    at("paper").replaceChildren(frame);
  }
}

async function send(command, text, target = "") {
  const reply = await fetch("/message", {
    method: "POST",
    headers: {"x-token": token, "content-type": "application/json"},
    body: JSON.stringify({command, text, target}),
  });
  at("sent").textContent = reply.ok ? `sent: ${command} ${target} ${text}`
                                    : `not sent: ${await reply.text()}`;
  if (reply.ok) at("text").value = "";
}

at("box").addEventListener("submit", (event) => {
  event.preventDefault();
  if (at("text").value.trim()) send("say", at("text").value.trim());
});
for (const button of document.querySelectorAll("[data-command]"))
  button.onclick = () => send(button.dataset.command, at("text").value.trim());

const source = new EventSource(`/events?token=${encodeURIComponent(token)}`);
source.onmessage = (event) => show(JSON.parse(event.data));
source.onerror = () => { at("state").textContent = "the page's server does not answer"; };
