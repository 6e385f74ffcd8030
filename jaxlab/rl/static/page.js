'use strict';
// Watches a run, replays its episodes, and acts in an environment that was taken over.
// All text of environments is set as text, never as markup.
const $ = (id) => document.getElementById(id);
const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
let seen = { slots: {}, tasks: [] };
let choices = null;
let hand = null; // the slot that this page has taken
let drag = null; // where a drag began

async function wish(body) {
  const answer = await fetch('wish', { method: 'POST', body: JSON.stringify(body) });
  if (!answer.ok) $('state').textContent = (await answer.json()).error;
  return answer.ok;
}

// ------------------------------------------------------------------------- live
const stream = new EventSource('events');
stream.onopen = () => { $('state').textContent = 'live'; };
stream.onerror = () => { $('state').textContent = 'not connected; trying again'; };
stream.onmessage = (event) => {
  seen = JSON.parse(event.data);
  if (seen.actions) prepare(seen.actions);
  figures();
  tasks();
  slots();
  if (hand) showHand();
};

function figures() {
  const f = seen.figures;
  const states = Object.entries(f).filter(([name]) => name.startsWith('env_'));
  const all = states.reduce((sum, [, seconds]) => sum + seconds, 0) || 1;
  const shares = states.map(([name, s]) => `${name.slice(4).replace('_', ' for ')} ${(100 * s / all).toFixed(0)} %`);
  $('figures').textContent = `version ${f.version}; environments ${shares.join(', ')}`;
}

function tasks() {
  const buttons = seen.tasks.map(({ task, paused }) => {
    const button = make('button', paused ? `${task} (paused)` : task);
    button.setAttribute('aria-pressed', paused);
    button.title = paused ? 'let it go on' : 'pause: no rollout of it begins';
    button.onclick = () => wish({ do: 'pause', task, paused: !paused });
    return button;
  });
  const now = JSON.stringify(seen.tasks);
  if ($('tasks').dataset.now === now) return; // do not take buttons from under a click
  $('tasks').dataset.now = now;
  $('tasks').replaceChildren(...buttons);
}

function slots() {
  const live = $('live');
  for (const card of [...live.children]) if (!seen.slots[card.dataset.slot]) card.remove();
  for (const [name, slot] of Object.entries(seen.slots)) {
    let card = [...live.children].find((c) => c.dataset.slot === name);
    if (!card) {
      card = $('slot').content.firstElementChild.cloneNode(true);
      card.dataset.slot = name;
      card.querySelector('.take').onclick = () => take(name);
      live.append(card);
    }
    card.querySelector('h2').textContent = `${name}: ${slot.task || 'idle'}`;
    card.querySelector('.text').textContent = slot.text;
    card.querySelector('.action').textContent = slot.taken ? 'taken over' : slot.action;
    card.querySelector('.take').disabled = slot.taken || Boolean(hand);
    const frame = `frame/${name}?${slot.seed}.${slot.t}`;
    const image = card.querySelector('img');
    if (image.dataset.frame !== frame && !$('live').hidden) {
      image.dataset.frame = frame;
      image.onload = () => image.style.setProperty('--shape', `${image.naturalWidth}/${image.naturalHeight}`);
      image.src = frame;
    }
  }
}

// ------------------------------------------------------------------ one's own hand
function prepare(actions) {
  choices = actions;
  $('hand-kind').replaceChildren(...Object.entries(choices.kinds)
    .filter(([, names]) => names.includes('xy'))
    .map(([name]) => new Option(name.toLowerCase().replace('_', ' '), name)));
  $('words').replaceChildren(...choices.words.filter((w) => w.trim().length).map((w) => new Option(w)));
  $('hand-fields').replaceChildren(...Array.from({ length: choices.fields }, (_, field) => {
    const button = make('button', '');
    button.onclick = () => act('TYPE_FIELD', { field });
    return button;
  }));
  $('hand-keys').replaceChildren(...choices.keys.map((name, key) => {
    const button = make('button', name.toLowerCase());
    button.onclick = () => act('KEY', { key });
    return button;
  }));
}

async function take(name) {
  if (!(await wish({ do: 'take', slot: name }))) return;
  hand = { slot: name, acted: '' };
  $('hand').showModal();
  showHand();
}

// What is asked for; an episode may end with its first action, and the next one begin.
const request = (slot) => `${slot.rollout}.${slot.t}`;
const asked = (slot) => slot.asking && request(slot) !== hand.acted;

function showHand() {
  const slot = seen.slots[hand.slot];
  if (!slot) return $('hand').close();
  $('hand-task').textContent = `${hand.slot}: ${slot.task}, seed ${slot.seed}`;
  $('hand-text').textContent = slot.text;
  $('hand-state').textContent = asked(slot)
    ? `your action ${slot.t + 1}` : 'the environment is at work';
  const quoted = slot.text.split('"').filter((_, i) => i % 2);
  [...$('hand-fields').children].forEach((button, i) => {
    button.hidden = i >= quoted.length;
    button.textContent = `type "${quoted[i]}"`;
  });
  const frame = `frame/${hand.slot}?${slot.seed}.${slot.t}`;
  if ($('hand-image').dataset.frame !== frame) {
    $('hand-image').dataset.frame = frame;
    $('hand-image').src = frame;
  }
}

async function act(kind, rest) {
  const slot = seen.slots[hand.slot];
  if (!asked(slot)) return;
  const number = Object.keys(choices.kinds).indexOf(kind);
  const { rollout, t } = slot;
  const sent = { do: 'act', slot: hand.slot, rollout, t, action: { kind: number, ...rest } };
  if (await wish(sent)) hand.acted = request({ rollout, t });
  showHand();
}

const place = (event) => {
  const box = $('hand-image').getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]
    .map((share) => Math.min(Math.max(share, 0), 1));
};
$('hand-image').onpointerdown = (event) => { drag = place(event); };
$('hand-image').onpointerup = (event) => {
  if (!drag) return;
  act($('hand-kind').value, { xy: drag, to: place(event) });
  drag = null;
};
$('hand-type').onclick = () => {
  const token = choices.words.indexOf($('hand-word').value);
  if (token > 1) act('TYPE', { token });
  else $('hand-state').textContent = 'no such word in the vocabulary';
};
$('hand-wait').onclick = () => act('WAIT', {});
$('hand-done').onclick = () => act('DONE', {});
$('hand-release').onclick = () => $('hand').close();
$('hand').onclose = () => {
  if (hand) wish({ do: 'release', slot: hand.slot });
  hand = null;
};

// ---------------------------------------------------------------- stored episodes
let replay = null;
let playing = null;

async function listEpisodes() {
  const rows = await (await fetch('episodes')).json();
  $('episodes').replaceChildren(...rows.map((row) => {
    const line = document.createElement('tr');
    line.tabIndex = 0;
    line.dataset.episode = `${row.kind}/${row.id}`;
    const cells = [`${row.kind} ${row.id}`, row.task, row.source, row.reward.toFixed(2), row.steps, row.version];
    line.append(...cells.map((value) => make('td', value)));
    line.onclick = () => open(row);
    line.onkeydown = (event) => { if (event.key === 'Enter') open(row); };
    return line;
  }));
}

async function open(row) {
  const answer = await fetch(`episode/${row.kind}/${row.id}`);
  if (!answer.ok) return;
  replay = { ...(await answer.json()), path: `episode/${row.kind}/${row.id}` };
  $('replay').hidden = false;
  $('replay-text').textContent = `${replay.task}, seed ${replay.seed}: ${replay.text} (${replay.source}, reward ${replay.reward.toFixed(2)})`;
  $('replay-actions').replaceChildren(...replay.actions.map((action) => make('li', action)));
  $('replay-at').max = replay.actions.length;
  step(0);
}

function step(t) {
  $('replay-at').value = t;
  $('replay-image').src = `${replay.path}/${t}`;
  [...$('replay-actions').children].forEach((line, i) => { line.className = i === t ? 'now' : ''; });
}

function stop() {
  clearInterval(playing);
  playing = null;
  $('replay-play').textContent = 'Play';
}

$('replay-at').oninput = () => step(Number($('replay-at').value));
$('replay-play').onclick = () => {
  if (playing) return stop();
  $('replay-play').textContent = 'Stop';
  if (Number($('replay-at').value) >= replay.actions.length) step(0);
  playing = setInterval(() => {
    const t = Number($('replay-at').value) + 1;
    step(t);
    if (t >= replay.actions.length) stop();
  }, 600);
};

for (const name of ['live', 'stored']) $(`show-${name}`).onclick = () => {
  for (const other of ['live', 'stored']) {
    $(other).hidden = other !== name;
    $(`show-${other}`).setAttribute('aria-pressed', other === name);
  }
  if (name === 'stored') listEpisodes();
};
