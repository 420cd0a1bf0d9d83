// The live view in headless Chromium, with a real troupe and with a made-up feed of the largest size. Needs nodejs and chromium
// (Debian packages); not part of `make test`. Usage: node tests/web/check.mjs [DIRECTORY FOR PICTURES]
import { spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openBrowser } from "./browser.mjs";
import { serveSynthetic } from "./synthetic.mjs";

const pictures = process.argv[2];
const sleep = ms => new Promise(done => setTimeout(done, ms));
const fail = text => { throw new Error(text); };
const expect = (what, truth) => { if (!truth) fail(what); console.log(`  ${what}`); };

async function startTroupe(directory) {
  const run = join(directory, "run");
  const child = spawn(process.env.TROUPE || "build/troupe", ["serve", "--model", "models/demo", "--port", "0", "--experts", "4", "--run-dir", run, "--threads", "1"], { stdio: ["ignore", "pipe", "inherit"] });
  let text = "";
  child.stdout.on("data", data => text += data);
  for (let i = 0; i < 200 && !/^serving/m.test(text); i++) await sleep(100);
  const url = /^serving .* at (http\S+)/m.exec(text);
  if (!url) fail("the troupe did not start");
  const stop = () => new Promise(done => { child.once("exit", done); child.kill("SIGTERM"); });
  return { url: url[1], pid: name => +readFileSync(join(run, name + ".pid"), "utf8"), stop };
}

const complete = (url, prompt, tokens) => fetch(url + "/v1/completions", { method: "POST", body: JSON.stringify({ prompt, max_tokens: tokens, ignore_eos: true, temperature: 0 }) }).then(r => r.json());
const heatPixels = page => page.run(`(() => { const c = $("heat"); return [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 !== 3).join() })()`);
// Answers of a length that is known, so that there is time to kill somebody meanwhile.
const LONG = `window.plainFetch ||= fetch; window.fetch = (url, o) => plainFetch(url, o && o.body ? { ...o, body: JSON.stringify({ ...JSON.parse(o.body), ignore_eos: true }) } : o)`;
const CHAT = LONG + `; $("prompt").value = "Tell me about rivers."; $("tokens").value = 1500; $("send").click()`;

async function checkReal(browser, directory) {
  console.log("a real troupe:");
  const troupe = await startTroupe(directory);
  try {
    const page = await browser.openPage(troupe.url + "/", { height: 1000 });
    await page.until(`$("status").textContent === "serving" && $("actors").rows.length === 8`, "the page shows 8 processes that serve");
    const cold = await heatPixels(page);
    await complete(troupe.url, "Once upon a time", 60);
    await sleep(1500);
    const prose = await heatPixels(page);
    expect("the heat map changes when there is load", prose !== cold);
    await complete(troupe.url, [5, 5, 5, 5, 5, 5], 2);
    await complete(troupe.url, Array(400).fill(77), 1);
    await sleep(1500);
    expect("and when the load shifts", await heatPixels(page) !== prose);
    expect("balancedness has been drawn", await page.run(`balance.length > 0 && balance.every(b => b.mean > 0 && b.mean <= 1)`));

    await page.run(CHAT);
    await page.until(`$("answer").textContent.length > 20`, "the chat streams");
    const before = await page.run(`$("answer").textContent.length`), killed = troupe.pid("expert-1");
    process.kill(killed, "SIGKILL");
    await page.until(`[...document.querySelectorAll("#timeline .lost")].some(i => i.textContent.includes("expert-1 lost"))`, "the loss is on the timeline");
    const after = await page.run(`$("answer").textContent.length`);
    expect(`the chat streams while expert-1 dies (${before} characters before, ${after} when it was seen)`, after > before);
    await page.until(`[...document.querySelectorAll("#timeline .lost")].some(i => /back \\+\\d/.test(i.textContent))`, "it is back");
    await page.until(`[...$("actors").rows].some(r => r.dataset.name === "expert-1" && r.dataset.state === "ready")`, "the table shows it ready");
    console.log("  " + await page.run(`document.querySelector("#timeline .lost span").textContent`));
    await page.until(`!chatting`, "the answer ends", 60000);
    expect("the answer has not failed: " + await page.run(`$("chat-says").textContent`), await page.run(`!$("chat-says").textContent.includes("failed")`));
    expect("a mark stands in the answer where the process died", await page.run(`document.querySelectorAll("#answer mark").length > 0`));

    // A process that cannot come back at once is shown as gone: stop its successor's supervisor-side restart by killing it repeatedly.
    await page.run(`window.sawGone = false; new MutationObserver(() => { sawGone = sawGone || [...$("actors").rows].some(r => r.dataset.name === "expert-2" && r.dataset.state === "gone") }).observe($("actors"), { subtree: true, attributes: true })`);
    for (let i = 0; i < 3; i++) { process.kill(troupe.pid("expert-2"), "SIGKILL"); await sleep(120 + 200 * i); }
    await page.until(`sawGone`, "a killed process is shown as gone");
    await page.until(`[...$("actors").rows].some(r => r.dataset.name === "expert-2" && r.dataset.state === "ready")`, "and as ready again");
    console.log("  a killed process is shown as gone, then ready");

    await page.run(`$("heat").focus()`);
    await page.key("ArrowRight"); await page.key("ArrowDown");
    expect("arrow keys move on the heat map: " + await page.run(`$("heat-says").textContent`), await page.run(`/^Layer 2, expert 1: /.test($("heat-says").textContent)`));
    expect("every control has a name", await page.run(`[...document.querySelectorAll("button, input, textarea, canvas[tabindex]")].every(n => n.textContent.trim() || n.getAttribute("aria-label") || n.getAttribute("aria-labelledby") || (n.labels && n.labels.length))`));
    if (pictures) await page.picture(join(pictures, "light.png"));
    expect("no complaint in the console: " + page.complaints.join("; "), page.complaints.length === 0);
    await page.close();

    for (const [name, options] of [["dark", { dark: true }], ["phone", { width: 390, height: 844 }]]) {
      const other = await browser.openPage(troupe.url + "/", options);
      await other.until(`$("status").textContent === "serving"`, name);
      await other.run(CHAT);
      await other.until(`!chatting`, "the answer ends", 60000);
      await sleep(700);
      expect(`${name}: nothing is wider than the window`, await other.run(`document.documentElement.scrollWidth <= innerWidth`));
      if (pictures) await other.picture(join(pictures, name + ".png"));
      expect(`${name}: no complaint in the console: ` + other.complaints.join("; "), other.complaints.length === 0);
      await other.close();
    }
  } finally { await troupe.stop(); }
}

async function checkLarge(browser) {
  console.log("320 processes, 58 x 256 experts:");
  const server = await serveSynthetic();
  const page = await browser.openPage(server.url);
  await page.until(`$("actors").rows.length === 321`, "all processes are shown");
  await sleep(1000);
  await page.run(`frames = { count: 0, longest: 0, total: 0 }`);
  const times = [], begin = await page.scriptTime();
  for (let i = 0, last = begin; i < 80; i++) { // a window of two frames at most: the feed has four events a second
    await sleep(125);
    const now = await page.scriptTime();
    times.push(now - last);
    last = now;
  }
  const frames = await page.run(`frames`), total = times.reduce((a, b) => a + b);
  const text = `${frames.count} frames, processor time of scripts: ${(total / frames.count).toFixed(1)} ms a frame, most in any eighth of a second ${Math.max(...times).toFixed(1)} ms (by the clock, with all that this machine does: mean ${(frames.total / frames.count).toFixed(1)}, longest ${frames.longest.toFixed(1)} ms)`;
  if (pictures) await page.picture(join(pictures, "large.png"));
  expect(text, frames.count > 20 && Math.max(...times) < 50);
  expect("no complaint in the console: " + page.complaints.join("; "), page.complaints.length === 0);
  server.close();
}

const directory = mkdtempSync(join(tmpdir(), "troupe-web-run-"));
const browser = await openBrowser();
try {
  await checkReal(browser, directory);
  await checkLarge(browser);
  console.log("all is well");
} catch (error) {
  console.error("FAILED: " + error.message);
  process.exitCode = 1;
} finally {
  await browser.close();
  rmSync(directory, { recursive: true, force: true });
  process.exit();
}
