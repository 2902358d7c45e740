// Images in, captions out: each image is one request and one card.
"use strict";

const $ = (selector, root = document) => root.querySelector(selector);
const status = $("#status");
const DARKEST = 0.85;

function chosenOptions() {
  const query = new URLSearchParams({ attention: "true" });
  if ($("#beams").value) query.set("beam_size", $("#beams").value);
  return query;
}

function endpoint(query) {
  return new URL(`v1/caption?${query}`, document.baseURI).href;
}

function headers() {
  return $("#key").value ? { Authorization: `Bearer ${$("#key").value}` } : {};
}

function add(files) {
  const images = [...files].filter((file) => file.type.startsWith("image/") || !file.type);
  const others = [...files].filter((file) => !images.includes(file));
  status.textContent = others.length ? `No image file: ${others.map((file) => file.name).join(", ")}` : "";
  images.forEach((file) => caption(file, newCard(file)));
}

function newCard(file) {
  const card = $("#card").content.firstElementChild.cloneNode(true);
  const picture = $("img", card);
  picture.src = URL.createObjectURL(file);
  picture.onload = picture.onerror = () => URL.revokeObjectURL(picture.src);
  $("figcaption", card).textContent = file.name;
  $("#results").prepend(card);
  return card;
}

async function caption(file, card) {
  const query = chosenOptions();
  card.setAttribute("aria-busy", "true");
  $(".caption", card).textContent = "…";
  for (const part of [".error", ".again", ".hint", ".more"]) $(part, card).hidden = true;
  showCommand(card, file, query);
  try {
    const form = new FormData();
    form.append("image", file);
    const answer = await fetch(endpoint(query), { method: "POST", body: form, headers: headers() });
    const body = await answer.json().catch(() => ({}));
    if (!answer.ok) throw problem(answer, body);
    show(card, body);
  } catch (error) {
    showError(card, file, error);
  } finally {
    card.removeAttribute("aria-busy");
  }
}

function problem(answer, body) {
  const error = new Error(body.detail || `The server answered ${answer.status}.`);
  error.status = answer.status;
  return error;
}

function showError(card, file, error) {
  const known = error.status !== undefined;
  $(".caption", card).textContent = "";
  $(".error", card).textContent = known ? error.message : "The server cannot be reached.";
  $(".error", card).hidden = false;
  if (error.status === 401) {
    $("#key-label").hidden = false;
    $("#key").focus();
  }
  // Another try helps where the server, the network or the key was the reason, not where the image was.
  const again = $(".again", card);
  again.hidden = known && ![401, 408, 429].includes(error.status) && error.status < 500;
  again.onclick = () => caption(file, card);
}

function show(card, body) {
  const result = body.results[0];
  const alternatives = result.alternatives;
  const words = result.attention ? showWords(card, result.attention) : false;
  if (!words) $(".caption", card).textContent = result.caption;
  $(".hint", card).hidden = !words;
  $("img", card).alt = result.caption;
  $(".more", card).hidden = alternatives.length === 0;
  $("tbody", card).replaceChildren(...[result, ...alternatives].map(row));
  const times = body.timings_ms;
  $(".facts", card).textContent =
    `${body.model}, ${body.model_id} · ${Math.round(times.total)} ms, ${Math.round(times.model)} of them the model`;
}

function row(each) {
  const tr = document.createElement("tr");
  for (const text of [each.caption, percent(each.probability)]) {
    const td = document.createElement("td");
    td.textContent = text;
    tr.append(td);
  }
  return tr;
}

function percent(probability) {
  return `${(100 * probability).toPrecision(2)} %`;
}

// The words as buttons: pointing at one, or reaching it with Tab or the arrow keys, shows where the model looked.
function showWords(card, attention) {
  const canvas = $("canvas", card);
  const line = $(".caption", card);
  const buttons = attention.words.map((word, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = word;
    button.setAttribute("aria-pressed", "false");
    const on = () => {
      buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      draw(canvas, attention.weights[index], attention.box);
    };
    const off = () => {
      button.setAttribute("aria-pressed", "false");
      canvas.hidden = true;
    };
    button.onfocus = button.onpointerenter = button.onclick = on;
    button.onblur = button.onpointerleave = off;
    button.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step && buttons[index + step]) buttons[index + step].focus();
      if (event.key === "Escape") off();
    };
    return button;
  });
  line.replaceChildren(...buttons.flatMap((button) => [button, " "]));
  return buttons.length > 0;
}

// Dark where the weight is low and where the model saw nothing, clear where it is high; the browser smooths the few cells
// over their box, which is the whole picture unless the model crops or pads.
function draw(canvas, weights, [left, top, right, bottom]) {
  const rows = weights.length;
  const columns = weights[0].length;
  const highest = Math.max(...weights.flat());
  const pixels = new ImageData(columns, rows);
  weights.flat().forEach((weight, cell) => {
    pixels.data[4 * cell + 3] = 255 * DARKEST * (1 - weight / highest);
  });
  const small = document.createElement("canvas");
  small.width = columns;
  small.height = rows;
  small.getContext("2d").putImageData(pixels, 0, 0);
  canvas.width = canvas.clientWidth || canvas.parentElement.clientWidth;
  canvas.height = canvas.clientHeight || canvas.parentElement.clientHeight;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  const seen = [left * canvas.width, top * canvas.height, (right - left) * canvas.width, (bottom - top) * canvas.height];
  context.fillStyle = `rgb(0 0 0 / ${DARKEST})`;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.clearRect(...seen);
  context.drawImage(small, ...seen);
  canvas.hidden = false;
}

function showCommand(card, file, query) {
  const key = $("#key").value ? ' -H "Authorization: Bearer $RAYCAP_KEY"' : "";
  const command = `curl${key} -F ${quoted(`image=@${file.name}`)} ${quoted(endpoint(query))}`;
  $(".copy code", card).textContent = command;
  const button = $(".copy button", card);
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(command);
      button.textContent = "Copied";
    } catch {
      // Browsers give the clipboard to secure origins alone: mark the command, so that Ctrl-C takes it.
      getSelection().selectAllChildren($(".copy code", card));
      button.textContent = "Marked: press Ctrl-C";
    }
  };
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

$("#form").addEventListener("submit", (event) => event.preventDefault());
$("#file").addEventListener("change", (event) => {
  add(event.target.files);
  event.target.value = "";
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) add(event.clipboardData.files);
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("#drop").classList.add("over");
});
addEventListener("dragleave", () => $("#drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  $("#drop").classList.remove("over");
  add(event.dataTransfer.files);
});
