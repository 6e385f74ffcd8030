// Experts of MiniWoB++ tasks: oracles[task](instruction) says what to do next. They look
// at the page as it is, not at what was done before, so that they can go on from
// anywhere. An answer is null, where nothing is left to do, or an object of
//   do: a kind of action; at, to: points, centres of cells where there are some;
//   text: what to type; key: what to press.
(() => {
  const WIDTH = 160, HEIGHT = 210, CELL = 5;
  const all = (selector) => [...document.querySelectorAll(selector)];
  const one = (selector) => document.querySelector(selector);
  const text = (element) => element.textContent.replace(/\s+/g, ' ').trim();
  const labelled = (selector, label) => all(selector).find((e) => text(e) === label);
  const words = (q) => [...q.matchAll(/"([^"]*)"/g)].map((m) => m[1]);

  // Where a press reaches an element: cells' centres, else pixels, else nothing.
  const points = (element) => {
    const box = element.getBoundingClientRect();
    const found = [];
    const look = (start, step) => {
      const first = (low) => start + step * Math.ceil((Math.max(low, 0) - start) / step);
      for (let y = first(box.top); y < Math.min(box.bottom, HEIGHT); y += step)
        for (let x = first(box.left); x < Math.min(box.right, WIDTH); x += step) {
          const top = document.elementFromPoint(x, y);
          if (top && element.contains(top)) found.push([x, y]);
        }
    };
    look(CELL / 2, CELL);
    if (!found.length) look(0.5, 1);
    return found;
  };
  const act = (kind, element, rest) => {
    const at = element ? points(element) : [];
    return at.length ? { do: kind, at, ...rest } : null;
  };
  const click = (element) => act('CLICK', element);
  const key = (name) => ({ do: 'KEY', key: name });
  // Toward a text in a field; null where it is there. `typed`: what shows as `value`.
  const fill = (field, value, typed = value) => {
    if (!field || field.value === value) return null;
    if (document.activeElement !== field) return click(field);
    if (!typed.startsWith(field.value)) return key('BACKSPACE');
    return { do: 'TYPE', text: typed.slice(field.value.length) };
  };
  // Clicks those of the boxes that are not as they should be.
  const check = (boxes, wanted) => {
    const wrong = boxes.find((box) => box.checked !== wanted(box));
    return wrong ? click(wrong.parentElement.tagName === 'LABEL' ? wrong.parentElement : wrong) : null;
  };
  const list = (q) => q.replace(/^Select /, '').replace(/ and click Submit\.$/, '').split(', ');
  const checkboxes = (q) =>
    check(all('#area input'), (box) => list(q).includes(text(box.parentElement))) || click(one('#subbtn'));
  const submit = () => click(one('#subbtn')) || click(one('#area button'));
  const fields = (q, pairs) => {
    for (const [selector, value] of pairs) {
      const step = fill(one(selector), value);
      if (step) return step;
    }
    return submit();
  };
  const links = (tabs) => (q) => {
    const wanted = all('.alink').filter((e) => text(e) === words(q)[0]);
    for (const link of wanted) { const step = click(link); if (step) return step; }
    return wanted.length ? click(tabs(wanted[0])) : null;
  };
  const tabOf = (link) => one(`#area ul a[href="#${link.closest('[id^=tabs-]').id}"]`);
  const scrollTo = (element, box) => {
    const inside = element.getBoundingClientRect(), outside = box.getBoundingClientRect();
    return act(inside.top < outside.top ? 'SCROLL_UP' : 'SCROLL_DOWN', box);
  };
  const ordinal = (q) => Number(q.match(/(\d+)(?:st|nd|rd|th)/)[1]);
  // Of the figures of shapes.js: size, colour, and what they show.
  const figures = () => {
    const found = all('#area_svg > *').map((e) => {
      const shown = { rect: 'rectangle', circle: 'circle', polygon: 'triangle' }[e.tagName] || text(e);
      const type = e.tagName !== 'text' ? 'shape' : /\d/.test(shown) ? 'digit' : 'letter';
      return { e, shown, type, colour: e.getAttribute('fill'), size: shapeSize(e) };
    });
    return found;
  };
  const shapeSize = (e) => {
    if (e.tagName === 'text') return parseFloat(e.getAttribute('font-size')) > 15 ? 'large' : 'small';
    if (e.tagName === 'circle') return parseFloat(e.getAttribute('r')) > 7 ? 'large' : 'small';
    return e.getBBox().width > 14 ? 'large' : 'small';
  };
  const matching = (description) => {
    const parts = description.split(' ');
    const last = parts.pop();
    return figures().filter((f) =>
      (last === 'item' || f.shown === last || f.type === last) &&
      parts.every((part) => part === f.size || part === f.colour));
  };
  const email = (q) => labelled('#main .email-sender', (q.match(/(?:by|from) ([^ .]+)/) || [])[1]);
  const inbox = (selector) => (q) => {
    const sender = email(q);
    if (!sender) return null;
    return click(sender.closest('.email-thread').querySelector(selector)) || scrollTo(sender, one('#main'));
  };
  const table = (name) => {
    const row = all('#tab tr').find((r) => text(r.cells[0]) === name);
    return text(row.cells[1]);
  };
  // What a key's repeat does to a select that has the focus, without its list open.
  const choose = (select, label) => {
    const at = select.selectedIndex, to = [...select.options].findIndex((o) => text(o) === label);
    if (at === to) return null;
    return document.activeElement === select ? key(at < to ? 'DOWN' : 'UP') : key('TAB');
  };
  const slide = (q) => {
    const handle = one('#slider .ui-slider-handle'), box = one('#slider').getBoundingClientRect();
    const slider = $('#slider').slider('option'), value = $('#slider').slider('value');
    const wanted = Number(q.match(/-?\d+/)[0]);
    if (value === wanted) return null;
    if (document.activeElement === handle && Math.abs(wanted - value) <= 3)
      return key(value < wanted ? 'RIGHT' : 'LEFT');
    const share = (wanted - slider.min) / (slider.max - slider.min);
    const to = slider.orientation === 'vertical'
      ? [box.left + box.width / 2, box.bottom - share * box.height]
      : [box.left + share * box.width, box.top + box.height / 2];
    return act('DRAG', handle, { to: [to] });
  };

  const oracles = {
    'click-test': () => click(one('#subbtn')),
    'click-test-2': () => click(one('#subbtn')),
    'click-test-transfer': (q) => click(labelled('#area button', q.match(/button (\w+)/)[1])),
    'click-button': (q) => all('#area button').filter((e) => text(e) === words(q)[0]).map(click).find(Boolean) || null,
    'click-button-sequence': () =>
      click(document.activeElement === one('#subbtn') ? one('#subbtn2') : one('#subbtn')),
    'click-dialog': () => click(one('.ui-dialog-titlebar-close')),
    'click-dialog-2': (q) => click(words(q)[0] === 'x'
      ? one('.ui-dialog-titlebar-close') : labelled('.ui-dialog-buttonset button', words(q)[0])),
    'click-link': (q) => click(labelled('.alink', words(q)[0])),
    'click-checkboxes': checkboxes,
    'click-checkboxes-large': checkboxes,
    'click-checkboxes-transfer': checkboxes,
    'click-option': checkboxes,
    'click-tab': (q) => click(labelled('#area ul a', q.match(/Tab #\d/)[0])),
    'click-tab-2-easy': links(tabOf),
    'click-tab-2-medium': links(tabOf),
    'click-tab-2': links(tabOf),
    'click-tab-2-hard': links(tabOf),
    'click-collapsible-nodelay': () =>
      one('.ui-accordion-content').offsetHeight ? click(one('#subbtn')) : click(one('.ui-accordion-header')),
    'click-collapsible-2-nodelay': links((link) => link.closest('.ui-accordion-content').previousElementSibling),
    'click-color': (q) => click(one(`#area .color[data-color="${q.match(/the (\w+) colored/)[1]}"]`)),
    'click-shades': (q) => {
      const wanted = q.match(/shades of (\w+)/)[1];
      const wrong = all('#area span').find((e) =>
        (e.dataset.color === wanted) !== e.classList.contains('selected'));
      return wrong ? click(wrong) : click(one('#submit'));
    },
    'click-shape': (q) => matching(q.match(/Click on an? (.*?)\.?$/)[1]).map((f) => click(f.e)).find(Boolean) || null,
    'count-shape': (q) => click(labelled('#count-buttons button',
      String(matching(q.match(/How many (.*?)s are/)[1]).length))),
    'identify-shape': () => {
      const [figure] = figures();
      const type = figure.type === 'shape' ? figure.shown : figure.type;
      return click(one(`#area-buttons button[data-type="${type}"]`));
    },
    'click-widget': (q) => all(`[data-type="${words(q)[0]}"]`).map(click).find(Boolean) || null,
    'choose-list': (q) =>
      choose(one('#options'), q.match(/Select (.*) from the list/)[1]) || click(one('#area button')),
    'focus-text': () => click(one('#tt')),
    'focus-text-2': (q) => click(one(`#tt${ordinal(q)}`)),
    'enter-text': (q) => fields(q, [['#tt', words(q)[0]]]),
    'enter-text-dynamic': (q) => fields(q, [['#tt', words(q)[0]]]),
    'enter-text-2': (q) => fields(q, [['#tt',
      / upper case/.test(q) ? words(q)[0].toUpperCase() : words(q)[0].toLowerCase()]]),
    'enter-password': (q) => fields(q, [['#password', words(q)[0]], ['#verify', words(q)[0]]]),
    'login-user': (q) => fields(q, [['#username', words(q)[0]], ['#password', words(q)[1]]]),
    'enter-date': (q) => {
      const [month, day, year] = q.match(/(\d+)\/(\d+)\/(\d+)/).slice(1);
      if (one('#tt').value === `${year}-${month}-${day}`) return submit();
      if (document.activeElement !== one('#tt')) {
        const at = points(one('#tt')), left = Math.min(...at.map(([x]) => x));
        return { do: 'CLICK', at: at.filter(([x]) => x < left + 12) }; // the month
      }
      return { do: 'TYPE', text: `${month}/${day}/${year}` };
    },
    'form-sequence-2': (q) => {
      const [radio, box] = [...q.matchAll(/(\d)(?:st|nd|rd)/g)].map((m) => Number(m[1]));
      return check(all('input[type=radio]'), (e) => e.value === String(radio)) ||
        fields(q, [[`#input-${box}`, words(q)[0]]]);
    },
    'form-sequence': (q) => {
      const box = Number(q.match(/(\d)(?:st|nd|rd) checkbox/)[1]);
      return slide(q) || check(all('input'), (e) => e.id === `checkbox-${box}`) || submit();
    },
    'use-slider': (q) => slide(q) || submit(),
    'use-spinner': (q) => {
      const now = Number(one('#spinner').value), wanted = Number(q.match(/-?\d+/)[0]);
      if (now === wanted) return submit();
      return click(one(now < wanted ? '.ui-spinner-up' : '.ui-spinner-down'));
    },
    'use-autocomplete-nodelay': (q) => {
      const [first, last] = words(q), field = one('#tags');
      const item = ui_utils.COUNTRIES.find((c) => c.startsWith(first) && c.endsWith(last || ''));
      if (field.value === item)
        return all('.ui-autocomplete').some((e) => e.offsetHeight) ? key('ESCAPE') : submit();
      const offered = all('.ui-menu-item').find((e) => e.offsetHeight && text(e) === item);
      return (offered && click(offered)) || fill(field, item, first.length > field.value.length ? first : item);
    },
    'grid-coordinate': (q) => click(document.getElementById(q.match(/\(.*\)/)[0])),
    'navigate-tree': (q) => {
      for (const file of all('#tree span').filter((e) => text(e) === words(q)[0])) {
        for (let e = file; e; e = e.parentElement.closest('#tree ul')?.previousElementSibling) {
          const step = click(e);
          if (step) return step;
        }
      }
      return null;
    },
    'read-table': (q) => fields(q, [['#tt', table(q.match(/value of (.*) into/)[1])]]),
    'read-table-2': (q) => fields(q, [1, 2].map((i) => [`#tt${i}`, table(text(one(`#ll${i}`)).slice(0, -1))])),
    'simple-arithmetic': (q) => {
      const [, a, sign, b] = text(one('#math-problem')).match(/(\d+) (.) (\d+)/);
      const answer = { '+': +a + +b, '-': a - b, x: a * b }[sign];
      return fields(q, [['#math-answer', String(answer)]]);
    },
    'simple-algebra': (q) => {
      const [, a, sign, b, sum] = text(one('#math-problem')).match(/(\w+) (.) (\w+) = (\d+)/);
      const answer = sign === '+' ? sum - (a === 'x' ? b : a) : a === 'x' ? +sum + +b : a - sum;
      return fields(q, [['#math-answer', String(answer)]]);
    },
    'visual-addition': (q) => fields(q, [['#math-answer', String(all('.addition-block').length)]]),
    'odd-or-even': () => {
      for (const row of all('.row')) {
        const odd = Math.abs(Number(text(row.querySelector('.display-number')))) % 2 === 1;
        const button = row.querySelector(odd ? '.odd' : '.even');
        if (!button.classList.contains('selected')) return click(button);
      }
      return click(one('#submit'));
    },
    'find-word': (q) => fields(q, [['#answer-input',
      text(one('#area p')).split(' ')[ordinal(q) - 1].replace(/[^a-zA-Z]+/g, '')]]),
    'scroll-text': (q) => {
      const box = one('#text-area');
      const seen = box.scrollTop + box.clientHeight >= box.scrollHeight - 12;
      const last = box.value.trim().split(/\s/).pop().replace(/[^a-zA-Z0-9]/g, '');
      return seen || one('#answer-input').value ? fields(q, [['#answer-input', last]]) : act('SCROLL_DOWN', box);
    },
    'search-engine': (q) => {
      const n = ordinal(q), page = String(Math.ceil(n / 3));
      const shown = one('#pagination .active');
      if (!shown) return fill(one('#search-text'), words(q)[0]) || click(one('#search'));
      if (text(shown) !== page) return click(labelled('#pagination a', page));
      return click(all('.search-title')[(n - 1) % 3]);
    },
    'social-media': (q) => {
      const [user, name] = q.match(/the user (\S+), click on the "(.*)"/).slice(1);
      for (const media of all('.media').filter((m) => text(m.querySelector('.username')) === user)) {
        const plain = { Reply: '.reply', Retweet: '.retweet', Like: '.like' }[name];
        const item = plain ? media.querySelector(plain)
          : [...media.querySelectorAll('li')].find((e) => text(e).startsWith(name));
        return click(item) || (plain ? null : item.offsetHeight ? scrollTo(item, one('#area'))
          : click(media.querySelector('.more'))) || scrollTo(media, one('#area'));
      }
      return null;
    },
    'email-inbox-delete': inbox('.trash'),
    'email-inbox-important': inbox('.star'),
    'multi-orderings': (q) => {
      const [, genre, name, year] = q.match(/for (.*) movies directed by (.*) from year (\d+)/);
      for (const row of all('#area tr')) {
        const value = { Genre: genre, Director: name, Year: year }[text(row.cells[0])];
        const step = fill(row.querySelector('input'), value);
        if (step) return step;
      }
      return click(one('#area .final'));
    },
    'drag-box': () => {
      const small = one('#draggableSmall').getBoundingClientRect();
      const large = one('#draggableLarge').getBoundingClientRect();
      const left = small.left - large.left, top = small.top - large.top;
      if (left > 2 && left < 28 && top > 2 && top < 28) return submit();
      const at = points(one('#draggableSmall'));
      if (!at.length) return act('DRAG', one('#draggableLarge'), { to: [[80, 120]] });
      // Where it was taken is where it is let go, so that it lands in the middle.
      const [x, y] = at[0];
      return { do: 'DRAG', at: [[x, y]], to: [[x - left + 15, y - top + 15]] };
    },
    'find-greatest': () => {
      const cards = all('.card'), values = cards.map((c) => Number(text(c)));
      const best = cards[values.indexOf(Math.max(...values))];
      return best.classList.contains('hidden') ? click(best) : click(one('#submit'));
    },
  };
  return oracles;
})()
