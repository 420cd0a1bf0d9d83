// troupe top in a real terminal (tmux), with a real troupe that works and loses a process: what is on the screen, in which order, in which
// colours. Needs nodejs, tmux and, for a picture of the screen, chromium. Usage: node tests/web/terminal.mjs [PICTURE.png]
import { execFileSync, spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openBrowser } from "./browser.mjs";

const TROUPE = process.env.TROUPE || "build/troupe", COLUMNS = 124, LINES = 34;
const sleep = ms => new Promise(done => setTimeout(done, ms));
const directory = mkdtempSync(join(tmpdir(), "troupe-terminal-")), run = join(directory, "run");
const tmux = (...words) => execFileSync("tmux", ["-S", join(directory, "tmux"), "-f", "/dev/null", ...words], { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] });
const screen = (...more) => tmux("capture-pane", "-p", "-t", "top", ...more);
const expect = (what, truth) => { if (!truth) throw new Error(what + "\n" + screen()); console.log("  " + what); };
async function until(what, truth, timeout = 15000) {
  for (const end = Date.now() + timeout; Date.now() < end; await sleep(50)) if (truth()) { console.log("  " + what); return; }
  throw new Error("never came true: " + what + "\n" + screen());
}

/* The screen as tmux tells it, with its colours, as HTML. */
function asPage(text) {
  const colour = { 31: "#ff6c60", 36: "#5cc9c1" }, escape = s => s.replace(/&/g, "&amp;").replace(/</g, "&lt;");
  let bold = false, reverse = false, front = "", html = "";
  for (const part of text.split(/(\x1b\[[0-9;]*m)/)) {
    const codes = /^\x1b\[([0-9;]*)m$/.exec(part);
    if (!codes) { html += `<span style="${bold ? "font-weight:bold;" : ""}${reverse ? "background:#d8dce2;color:#15181d;" : front ? `color:${front};` : ""}">${escape(part)}</span>`; continue; }
    for (const code of codes[1].split(";").map(Number)) {
      if (code === 0) { bold = reverse = false; front = ""; }
      if (code === 1) bold = true;
      if (code === 7) reverse = true;
      if (code === 27) reverse = false;
      if (code === 39) front = "";
      if (colour[code]) front = colour[code];
    }
  }
  return `<!doctype html><meta charset=utf-8><body style="margin:0;background:#15181d;color:#d8dce2"><pre style="margin:10px;font:13px/1.25 'DejaVu Sans Mono',monospace">${html}</pre>`;
}

async function takePicture(file, text) {
  const page = join(directory, "screen.html"), browser = await openBrowser();
  writeFileSync(page, asPage(text));
  const view = await browser.openPage("file://" + page, { width: 1000, height: 300 });
  await sleep(300);
  await view.picture(file);
  await browser.close();
}

const troupe = spawn(TROUPE, ["serve", "--model", "models/demo", "--port", "0", "--experts", "3", "--threads", "1", "--run-dir", run], { stdio: ["ignore", "pipe", "ignore"] });
try {
  let text = "";
  troupe.stdout.on("data", data => text += data);
  for (let i = 0; i < 300 && !/^serving/m.test(text); i++) await sleep(100);
  const url = /^serving .* at (http\S+)/m.exec(text)[1];
  const load = tokens => fetch(url + "/v1/completions", { method: "POST", body: JSON.stringify({ prompt: "And it came to pass", max_tokens: tokens, ignore_eos: true }) }).then(r => r.json());
  tmux("new-session", "-d", "-s", "top", "-x", String(COLUMNS), "-y", String(LINES), `env TERM=screen-256color ${TROUPE} top --url ${url}`);
  await until("the screen shows all seven processes", () => /7 processes/.test(screen()) && /expert-2 .* ready/.test(screen()) && /X no holder/.test(screen()));
  expect("processes are in the order of their names", /attention-0[\s\S]*expert-0[\s\S]*expert-2[\s\S]*sampler-0/.test(screen()));
  await load(300);
  tmux("send-keys", "-t", "top", "r");
  await until("r: in the order of their rows, which the head marks", () => / rows\* /.test(screen()) && /attention-0[\s\S]*expert-[\s\S]*gateway/.test(screen()));
  tmux("send-keys", "-t", "top", "i");
  await until("i: the other way round", () => / rows\^ /.test(screen()) && /gateway[\s\S]*expert-[\s\S]*attention-0/.test(screen()));
  tmux("send-keys", "-t", "top", "n");
  const answer = load(1200);
  await sleep(700);
  process.kill(+readFileSync(join(run, "expert-1.pid"), "utf8"), "SIGKILL");
  await until("a killed process is shown as lost, in red", () => /\x1b\[[0-9;]*31m.*expert-1 lost with/.test(screen("-e")));
  const gone = screen("-e");
  await until("and as back", () => /expert-1 lost with .*back after/.test(screen()) && /expert-1 .* ready/.test(screen()));
  if (process.argv[2]) await takePicture(process.argv[2], /expert-1 .* gone/.test(gone) ? gone : screen("-e"));
  await answer;
  process.kill(+readFileSync(join(run, "gateway.pid"), "utf8"), "SIGKILL");
  await until("a gateway that is away is said to be", () => /the gateway has closed the connection; trying again/.test(screen()));
  await until("and found again", () => /order: n name/.test(screen()) && /7 processes/.test(screen()));
  tmux("resize-window", "-t", "top", "-x", "70", "-y", "16");
  await until("a small window is kept to", () => /\bquit|order:/.test(screen()) && screen().split("\n").every(l => l.length <= 70));
  tmux("send-keys", "-t", "top", "q");
  await until("q ends it", () => { try { tmux("has-session", "-t", "top"); return false; } catch { return true; } });
  const once = execFileSync(TROUPE, ["top", "--once", "--url", url], { encoding: "utf8" });
  if (!/^troupe .*\n/.test(once) || /\x1b/.test(once) || !/expert-2/.test(once)) throw new Error("--once: " + once);
  console.log("  --once prints plain text");
  console.log("top is well");
} catch (error) {
  console.error("FAILED: " + error.message);
  process.exitCode = 1;
} finally {
  try { tmux("kill-server"); } catch { /* it has ended by itself */ }
  await new Promise(done => { troupe.once("exit", done); troupe.kill("SIGTERM"); });
  rmSync(directory, { recursive: true, force: true });
}
