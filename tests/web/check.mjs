// The live view in headless Chromium, with a real troupe and with a made-up feed of the largest size. Needs nodejs and chromium
// (Debian packages); not part of `make test`. Usage: node tests/web/check.mjs [DIRECTORY FOR PICTURES]
import { spawn } from "node:child_process";
import { createServer } from "node:net";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openBrowser } from "./browser.mjs";
import { BUDGET_MS, inWords, measure, simulate, startReplay } from "./large.mjs";

const pictures = process.argv[2];
const sleep = ms => new Promise(done => setTimeout(done, ms));
const fail = text => { throw new Error(text); };
const expect = (what, truth) => { if (!truth) fail(what); console.log(`  ${what}`); };

const freePort = () => new Promise(done => { const s = createServer().listen(0, "127.0.0.1", () => { const { port } = s.address(); s.close(() => done(port)); }); });

async function startTroupe(directory) {
  const run = join(directory, "run"), journal = join(directory, "run.journal"), admin = "127.0.0.1:" + await freePort();
  const child = spawn(process.env.TROUPE || "build/troupe", ["serve", "--model", "models/demo", "--port", "0", "--experts", "4", "--run-dir", run, "--threads", "1",
    "--allow-faults", "--admin", admin, "--journal", journal], { stdio: ["ignore", "pipe", "inherit"] });
  let text = "";
  child.stdout.on("data", data => text += data);
  for (let i = 0; i < 200 && !/^serving/m.test(text); i++) await sleep(100);
  const url = /^serving .* at (http\S+)/m.exec(text);
  if (!url) fail("the troupe did not start");
  const stop = () => new Promise(done => { child.once("exit", done); child.kill("SIGTERM"); });
  return { url: url[1], console: /^admin at (http\S+)/m.exec(text)[1], journal, pid: name => +readFileSync(join(run, name + ".pid"), "utf8"), stop };
}

const complete = (url, prompt, tokens) => fetch(url + "/v1/completions", { method: "POST", body: JSON.stringify({ prompt, max_tokens: tokens, ignore_eos: true, temperature: 0 }) }).then(r => r.json());
/* The most loaded cells of the heat map as they look: {cell: [red, green, blue]}, and how the cells `others` look now. */
const hottest = (page, others = []) => page.run(`(() => {
  const c = $("heat"), g = c.getContext("2d"), ratio = c.width / widthOf("heat"), rows = routedRows(), look = {};
  const height = rowHeight(rows.length, 420, 5, 64), step = step_(hello.experts);
  const at = (r, e) => [...g.getImageData((LEFT + (e + .3) * step) * ratio, (r + .3) * height * ratio, 1, 1).data].slice(0, 3);
  const cells = rows.map((layer, r) => { const of = window_.subarray(layer * hello.experts, (layer + 1) * hello.experts); return [r, of.indexOf(Math.max(...of))]; });
  for (const [r, e] of [...cells, ...${JSON.stringify(others)}]) look[[r, e]] = at(r, e);
  return { cells, look };
})()`);
const isOrange = ([r, , b]) => r > b + 50;
const heatPixels = page => page.run(`(() => { const c = $("heat"); return [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 !== 3).join() })()`);
/* WCAG contrast of every colour of text with the ground that it stands on. */
const contrasts = page => page.run(`(() => {
  const style = getComputedStyle(document.documentElement), rgb = n => [1, 3, 5].map(i => parseInt(style.getPropertyValue("--" + n).trim().padEnd(4).replace(/^#(.)(.)(.)\\s*$/, "#$1$1$2$2$3$3").slice(i, i + 2), 16) / 255);
  const light = n => { const [r, g, b] = rgb(n).map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
  return ["text", "soft", "good", "bad", "wait"].flatMap(n => ["card", "page"].map(on => [n + " on " + on, ratio(n, on)]));
})()`);
async function expectContrast(page, name) {
  const low = (await contrasts(page)).filter(([, ratio]) => !(ratio >= 4.5));
  expect(`${name}: all text has a contrast of 4.5 or more ${low.map(([what, ratio]) => `(${what}: ${ratio.toFixed(1)})`).join()}`, low.length === 0);
}
/* Tab goes through everything that can be used, and what has the focus shows it. */
async function expectTabs(page, name) {
  await page.run(`(h => { h.tabIndex = -1; h.focus(); })(document.querySelector("h1"))`);
  const reached = new Set();
  for (let i = 0; i < 60; i++) {
    await page.key("Tab");
    const at = await page.run(`(e => e === document.body ? "" : (e.id || e.textContent || e.getAttribute("aria-label")) + (getComputedStyle(e).outlineStyle === "none" && e.tagName !== "INPUT" ? " without outline" : ""))(document.activeElement)`);
    if (at === "" && reached.size > 3) break;
    if (at) reached.add(at);
  }
  const must = ["theme", "heat", "place", "answer", "prompt", "tokens", "send", "epochs"].filter(id => ![...reached].some(r => r === id));
  expect(`${name}: Tab reaches ${reached.size} controls, each with an outline${must.length ? ", but not " + must.join() : ""}`, must.length === 0 && ![...reached].some(r => r.includes("without outline")));
}
// An answer of a length that is known, so that there is time to kill somebody meanwhile.
const CHAT = `$("endless").checked = true; $("prompt").value = "Tell me about rivers."; $("tokens").value = 1500; $("send").click()`;

async function checkReal(browser, directory) {
  console.log("a real troupe:");
  const troupe = await startTroupe(directory);
  try {
    const page = await browser.openPage(troupe.url + "/", { height: 1000 });
    await page.until(`$("status").textContent === "serving" && $("actors").rows.length === 8`, "the page shows 8 processes that serve");
    const cold = await heatPixels(page);
    await complete(troupe.url, "In the beginning God created the heaven and the earth.", 60);
    await sleep(1500);
    const prose = await hottest(page);
    expect("the heat map changes when there is load", await heatPixels(page) !== cold);
    expect("the most loaded expert of each layer is orange", prose.cells.every(c => isOrange(prose.look[c])));
    for (let i = 0; i < 6; i++) await complete(troupe.url, "def __init__(self, name, value=None):\n    self.name = name\n    if value is None:\n", 60);
    await sleep(1500);
    const code = await hottest(page, prose.cells), cooled = prose.cells.filter(c => !isOrange(code.look[c]));
    expect(`when the load shifts from prose to code, others are orange (${cooled.length} of ${prose.cells.length} that were are no more)`, cooled.length > 0 && code.cells.every(c => isOrange(code.look[c])));
    expect("balancedness has been drawn", await page.run(`balance.length > 0 && balance.every(b => b.mean > 0 && b.mean <= 1)`));

    expect("no buttons on the public address", await page.run(`$("controls").hidden && !hello.faults`));
    await page.run(CHAT);
    await page.until(`$("answer").textContent.length > 20`, "the chat streams");
    const before = await page.run(`$("answer").textContent.length`), killed = troupe.pid("expert-1");
    process.kill(killed, "SIGKILL");
    await page.until(`[...document.querySelectorAll("#timeline .lost")].some(i => i.textContent.includes("expert-1 lost"))`, "the loss is on the timeline");
    const after = await page.run(`$("answer").textContent.length`);
    expect(`the chat streams while expert-1 dies (${before} characters before, ${after} when it was seen)`, after > before);
    await page.until(`[...document.querySelectorAll("#timeline .lost")].some(i => /back \\+\\d/.test(i.textContent) && !i.textContent.includes("…"))`, "it is back, and all stages of the repair are told");
    expect("a bar shows the stages", await page.run(`document.querySelectorAll("#timeline .lost .bar i").length >= 2`));
    await page.until(`[...$("actors").rows].some(r => r.dataset.name === "expert-1" && r.dataset.state === "ready")`, "the table shows it ready");
    console.log("  " + await page.run(`document.querySelector("#timeline .lost span").textContent`));
    await page.until(`!chatting`, "the answer ends", 180000);
    expect("the answer has not failed: " + await page.run(`$("chat-says").textContent`), await page.run(`!$("chat-says").textContent.includes("failed")`));
    expect("a mark stands in the answer where the process died", await page.run(`document.querySelectorAll("#answer mark").length > 0`));

    expect("each piece says who computed it", await page.run(`served.length > 20 && served.every(s => s.by.has("attention-0") && s.by.has("sampler-0") && [...s.by.keys()].some(n => n.startsWith("expert")))`));
    await page.run(`$("served").focus()`);
    await page.key("End");
    expect("arrow keys tell who: " + await page.run(`$("served-says").value`), await page.run(`/rows|attention/.test($("served-says").value) && document.querySelectorAll("#answer .at").length === 1`));
    await page.run(`$("ask-way").click()`);
    await page.until(`document.querySelectorAll("#way .bar").length === 1 + hello.layers`, "the way of the request is shown, layer by layer");
    expect("its way: " + await page.run(`$("way-body").querySelectorAll("p")[1].textContent`), await page.run(`/steps of/.test($("way-body").textContent)`));

    // A process that cannot come back at once is shown as gone: stop its successor's supervisor-side restart by killing it repeatedly.
    await page.run(`window.looks = r => getComputedStyle(r.cells[2]).color.match(/\\d+/g).map(Number); window.sawGone = false; new MutationObserver(() => { sawGone = sawGone || [...$("actors").rows].some(r => r.dataset.name === "expert-2" && r.dataset.state === "gone" && looks(r)[0] > 1.5 * looks(r)[2]) }).observe($("actors"), { subtree: true, attributes: true })`);
    for (let i = 0; i < 3; i++) { try { process.kill(troupe.pid("expert-2"), "SIGKILL"); } catch { /* it has not been started again yet */ } await sleep(120 + 200 * i); }
    await page.until(`sawGone`, "a killed process is shown as gone, in red");
    await page.until(`[...$("actors").rows].some(r => r.dataset.name === "expert-2" && r.dataset.state === "ready")`, "and as ready again");
    expect("a killed process is shown as gone, in red, then as ready, in green", await page.run(`(([r, g, b]) => g > r)(looks([...$("actors").rows].find(r => r.dataset.name === "expert-2")))`));

    await page.run(`$("heat").focus()`);
    await page.key("ArrowRight"); await page.key("ArrowDown");
    expect("arrow keys move on the heat map: " + await page.run(`$("heat-says").textContent`), await page.run(`/^Layer 2, expert 1: /.test($("heat-says").textContent)`));
    await page.run(`$("epochs").click()`);
    expect("epochs can be hidden", await page.run(`[...document.querySelectorAll("#timeline .epoch")].every(i => !i.offsetParent) && document.querySelector("#timeline .lost").offsetParent !== null`));
    await page.run(`$("epochs").click()`);
    await expectContrast(page, "light");
    await expectTabs(page, "keyboard");
    expect("hosts are named only where there are several", await page.run(`!$("heads").lastChild.offsetParent`));
    expect("what attention does besides is shown: " + await page.run(`$("sums").innerText.replace(/\\s+/g, " ")`), await page.run(`/Guessed tokens .* true of .*Bias version 0/.test($("sums").innerText.replace(/\\s+/g, " "))`));
    expect("every control has a name", await page.run(`[...document.querySelectorAll("button, input, textarea, canvas[tabindex]")].every(n => n.textContent.trim() || n.getAttribute("aria-label") || n.getAttribute("aria-labelledby") || (n.labels && n.labels.length))`));
    if (pictures) await page.picture(join(pictures, "light.png"));
    expect("no complaint in the console: " + page.complaints.join("; "), page.complaints.length === 0);
    await page.close();

    for (const [name, options] of [["dark", { dark: true }], ["phone", { width: 390, height: 844 }]]) {
      const other = await browser.openPage(troupe.url + "/", options);
      await other.until(`$("status").textContent === "serving"`, name);
      await other.run(CHAT);
      await other.until(`!chatting`, "the answer ends", 180000);
      await sleep(700);
      await expectContrast(other, name);
      expect(`${name}: nothing is wider than the window`, await other.run(`document.documentElement.scrollWidth <= innerWidth`));
      if (pictures) await other.picture(join(pictures, name + ".png"));
      expect(`${name}: no complaint in the console: ` + other.complaints.join("; "), other.complaints.length === 0);
      await other.close();
    }
    await checkCutOff(browser, troupe, troupe.url + "/", "public");
    await checkCutOff(browser, troupe, troupe.console, "admin");
    await checkConsole(browser, troupe);
  } finally { await troupe.stop(); }
  await checkReplay(browser, troupe.journal);
}

/* The gateway dies in the middle of an answer: the page finds the next one, and the answer goes on, with the same text as without. */
async function checkCutOff(browser, troupe, url, name) {
  const page = await browser.openPage(url, { height: 1000 });
  await page.until(`$("status").textContent === "serving"`, "serving");
  await page.run(CHAT);
  await page.until(`$("answer").textContent.length > 200`, "the chat streams");
  await page.run(`window.statuses = new Set(); new MutationObserver(() => statuses.add($("status").textContent)).observe($("status"), { childList: true, characterData: true, subtree: true })`);
  process.kill(troupe.pid("gateway"), "SIGKILL");
  await page.until(`statuses.has("no connection") && $("status").textContent === "serving"`, "the page says that the connection is lost, and comes back");
  await page.until(`!chatting`, "the answer ends", 180000);
  const said = await page.run(`$("chat-says").textContent`), id = await page.run(`lastId`);
  expect(`${name}: an answer goes on when its gateway is killed: ${said}`, /cut off [1-9]/.test(said));
  const shown = await page.run(`[...document.querySelectorAll("#answer .said, #answer .thought")].map(n => n.textContent).join("")`);
  const body = { messages: [{ role: "user", content: "Tell me about rivers." }], stream: true, max_tokens: 1500, ignore_eos: true };
  const whole = await fetch(troupe.url + "/v1/chat/completions", { method: "POST", body: JSON.stringify(body), headers: { "X-Request-Id": id.replace("chatcmpl-", ""), "X-Stream-Resume": "1" } }).then(r => r.text());
  const text = whole.split("\n").filter(l => l.startsWith("data: {")).map(l => JSON.parse(l.slice(6)).choices[0]?.delta.content || "").join("");
  expect(`${name}: with the very text that comes without that (${text.length} characters)`, text.length > 1000 && text === shown);
  const other = page.complaints.filter(c => !/Failed to load resource/.test(c)); // the browser itself notes that a connection was lost
  expect(`${name}: no complaint in the console but of the lost connection: ` + other.join("; "), other.length === 0);
  await page.close();
}

/* A gateway with a key: the page asks for it. */
async function checkKey(browser) {
  console.log("with an API key:");
  const child = spawn(process.env.TROUPE || "build/troupe", ["serve", "--model", "models/demo", "--port", "0", "--in-process", "--threads", "1", "--api-key", "the-key"], { stdio: ["ignore", "pipe", "inherit"] });
  process.once("exit", () => child.kill("SIGKILL"));
  let text = "";
  child.stdout.on("data", data => text += data);
  for (let i = 0; i < 200 && !/^Ctrl-C/m.test(text); i++) await sleep(100);
  const page = await browser.openPage(/^live view: open (http\S+)/m.exec(text)[1]);
  await page.until(`!$("key-form").hidden && $("status").textContent === "needs a key"`, "the page asks for a key");
  await page.run(`$("key").value = "another"; $("key-form").requestSubmit()`);
  await sleep(500);
  expect("a wrong one is not taken", await page.run(`!$("key-form").hidden && !hello`));
  await page.run(`$("key").value = "the-key"; $("key-form").requestSubmit()`);
  await page.until(`$("key-form").hidden && $("status").textContent === "serving"`, "the right one is");
  await page.run(`$("tokens").value = 8; $("send").click()`);
  await page.until(`!chatting && $("answer").textContent.length > 5`, "and the chat has it too");
  expect("the key is asked for, and used by the chat too", true);
  await page.close();
  await new Promise(done => { child.once("exit", done); child.kill("SIGTERM"); });
}

/* The admin address: buttons for all that, and the recording of it afterwards. */
async function checkConsole(browser, troupe) {
  console.log("the admin address:");
  const page = await browser.openPage(troupe.console, { height: 1000 });
  await page.until(`$("status").textContent === "serving" && !$("controls").hidden && !$("faults").hidden`, "the buttons are there");
  expect("the token has left the address bar", await page.run(`!location.href.includes("token")`));
  await page.run(CHAT);
  await page.until(`$("answer").textContent.length > 20`, "the chat streams here too");
  await page.run(`$("victim").value = "expert-3"; document.querySelector("[data-fault=kill]").click()`);
  await page.until(`[...document.querySelectorAll("#timeline .lost")].some(i => i.textContent.includes("expert-3 lost") && /back \\+\\d/.test(i.textContent) && !i.textContent.includes("…"))`, "the button kills, and the troupe repairs itself");
  console.log("  " + await page.run(`[...document.querySelectorAll("#timeline .lost span")].find(i => i.textContent.includes("expert-3 lost")).textContent`));
  await page.run(`$("scale-count").value = 5; $("scale-form").requestSubmit()`);
  await page.until(`[...epoch.member.values()].some(m => m.name === "expert-4" && m.state === "ready")`, "the scale button starts expert-4", 30000);
  await page.until(`[...document.querySelectorAll("#timeline .operation")].some(i => /scale experts to 5 — done/.test(i.textContent))`, "the operation is on the timeline", 30000);
  await page.run(`$("victim").value = "attention-0"; document.querySelector("[data-fault=stop]").click()`);
  await page.until(`$("controls-say").textContent.includes("inflicted")`, "a process is stopped for a while");
  await page.until(`!chatting`, "the answer ends", 180000);
  expect("the answer has not failed: " + await page.run(`$("chat-says").textContent`), await page.run(`!$("chat-says").textContent.includes("failed")`));
  if (pictures) { await page.run(`showWay()`); await sleep(300); await page.picture(join(pictures, "console.png")); }
  const wrong = await fetch(new URL("/fault", troupe.console), { method: "POST", body: JSON.stringify({ fault: "kill expert 0" }) });
  expect("without the token a fault is refused", wrong.status === 401);
  expect("no complaint in the console: " + page.complaints.join("; "), page.complaints.length === 0);
  await page.close();
}

async function checkReplay(browser, journal) {
  console.log("the recording:");
  const replay = await startReplay(journal), page = await browser.openPage(replay.url, { height: 1000 });
  // The gateway that began the recording was killed later: what each told is there.
  await page.until(`!$("replay").hidden && epoch && $("actors").rows.length > 5`, "the page shows the beginning");
  expect("the chat is not there, nor are the buttons", await page.run(`$("chat").hidden && $("controls").hidden`));
  await page.run(`$("play").click()`);
  await page.until(`want && want.speed === 0`, "it can be stopped");
  await page.run(`$("scrub").value = replaying.to; $("scrub").dispatchEvent(new Event("input")); $("scrub").dispatchEvent(new Event("change"))`);
  await page.until(`feedTime >= replaying.to - 2000 && [...document.querySelectorAll("#timeline .lost")].some(i => i.textContent.includes("expert-3 lost"))`, "at its end all faults are on the timeline");
  const gateways = await page.run(`new Set([...moments.values()].map(m => m.gateway)).size`);
  expect(`of ${gateways} gateways, one after the other`, gateways >= 2 && await page.run(`[...$("actors").rows].every(r => r.dataset.state !== "gone")`));
  expect("and a history of balancedness", await page.run(`balance.length > 2 && history.length > 10`));
  await page.run(`$("scrub").focus()`);
  await page.key("Home");
  await page.until(`feedTime < replaying.from + 5000 && ![...document.querySelectorAll("#timeline .lost")].length`, "the Home key goes back to before them");
  await page.run(`$("speed").value = "16"; $("play").click()`);
  await page.until(`feedTime > replaying.from + 8000`, "it plays, sixteen times as fast");
  if (pictures) await page.picture(join(pictures, "replay.png"));
  expect("no complaint in the console: " + page.complaints.join("; "), page.complaints.length === 0);
  await page.close();
  await replay.stop();
}

async function checkLarge(browser, directory) {
  console.log("320 processes, 58 x 256 experts, from the simulator:");
  const replay = await startReplay(simulate(directory)), page = await browser.openPage(replay.url), m = await measure(page, 20);
  if (pictures) await page.picture(join(pictures, "large.png"));
  expect(inWords(m), m.frames > 20 && m.most < BUDGET_MS);
  expect("no complaint in the console: " + page.complaints.join("; "), page.complaints.length === 0);
  await page.close();
  await replay.stop();
}

const directory = mkdtempSync(join(tmpdir(), "troupe-web-run-"));
const browser = await openBrowser();
try {
  await checkReal(browser, directory);
  await checkKey(browser);
  await checkLarge(browser, directory);
  console.log("all is well");
} catch (error) {
  console.error("FAILED: " + error.message);
  process.exitCode = 1;
} finally {
  await browser.close();
  rmSync(directory, { recursive: true, force: true });
  process.exit();
}
