// The page at its largest: 320 expert processes with 58 x 256 experts. The simulator (troupe sim --cluster) lives through a minute of
// it and records the feed as a gateway tells it, four times a second; troupe replay shows that in the page at its own speed.
// Usage: node tests/web/large.mjs [--seconds 30] [--picture FILE]
import { execFileSync, spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { openBrowser } from "./browser.mjs";

const TROUPE = process.env.TROUPE || "build/troupe", LAYERS = 58, EXPERTS = 256, WINDOWS = 6;
export const BUDGET_MS = 50; // of script, a frame

/* Loads of each window as `troupe sim` reads them: safetensors, int32 [window, layer, expert]; a few experts take most, others in each. */
function writeTrace(file) {
  let random = 1;
  const next = n => (random = (random * 48271) % 2147483647) % n;
  const load = Int32Array.from({ length: WINDOWS * LAYERS * EXPERTS }, (_, i) => 200 + next(600) + (next(12) === i % 12 ? 4000 : 0));
  const header = Buffer.from(JSON.stringify({ expert_load: { dtype: "I32", shape: [WINDOWS, LAYERS, EXPERTS], data_offsets: [0, load.byteLength] } }).padEnd(128));
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(BigInt(header.length));
  writeFileSync(file, Buffer.concat([size, header, Buffer.from(load.buffer)]));
}

export function simulate(directory) {
  const trace = join(directory, "loads.safetensors"), journal = join(directory, "large.journal");
  writeTrace(trace);
  execFileSync(TROUPE, ["sim", "--cluster", fileURLToPath(new URL("large.cluster", import.meta.url)), "--trace", trace, "--policy", "troupe", "--journal", journal]);
  return journal;
}

export async function startReplay(journal) {
  const child = spawn(TROUPE, ["replay", journal, "--port", "0"], { stdio: ["ignore", "pipe", "inherit"] });
  process.once("exit", () => child.kill("SIGKILL")); // whatever fails
  let text = "";
  child.stdout.on("data", data => text += data);
  for (let i = 0; i < 200 && !/http\S+/.test(text); i++) await new Promise(done => setTimeout(done, 50));
  if (!/http\S+/.test(text)) throw new Error("the replay did not start");
  return { url: /http\S+/.exec(text)[0], stop: () => new Promise(done => { child.once("exit", done); child.kill("SIGTERM"); }) };
}

/* Processor time of scripts in windows of an eighth of a second: at four sets of events a second a window has two frames at most. */
export async function measure(page, seconds) {
  await page.until(`hello && epoch && $("actors").rows.length > 330`, "all processes are shown", 60000);
  await page.run(`frames = { count: 0, longest: 0, total: 0 }`);
  const times = [], scripts = await page.scriptTime(), began = Date.now();
  for (let last = scripts; Date.now() - began < seconds * 1000;) {
    await new Promise(done => setTimeout(done, 125));
    const now = await page.scriptTime();
    times.push(now - last);
    last = now;
  }
  const frames = await page.run(`frames`), total = times.reduce((a, b) => a + b);
  return { frames: frames.count, mean: total / frames.count, most: Math.max(...times), clockMean: frames.total / frames.count, clockMost: frames.longest,
    shown: await page.run(`({ processes: $("actors").rows.length, cells: hello.routed.length * hello.experts, epoch: epoch.epoch })`) };
}

export function inWords(m) {
  return `${m.shown.processes} processes, ${m.shown.cells} experts, ${m.frames} frames: ${m.mean.toFixed(1)} ms of script a frame, most in any eighth of a second ` +
    `${m.most.toFixed(1)} ms (by the clock, with all that this machine does: mean ${m.clockMean.toFixed(1)}, longest ${m.clockMost.toFixed(1)} ms)`;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const option = (name, otherwise) => { const at = process.argv.indexOf(name); return at < 0 ? otherwise : process.argv[at + 1]; };
  const directory = mkdtempSync(join(tmpdir(), "troupe-web-large-"));
  const replay = await startReplay(simulate(directory)), browser = await openBrowser();
  try {
    const page = await browser.openPage(replay.url), m = await measure(page, +option("--seconds", 30));
    console.log(inWords(m));
    if (option("--picture")) await page.picture(option("--picture"));
    for (const complaint of page.complaints) console.log("complaint: " + complaint);
    process.exitCode = m.most < BUDGET_MS && m.frames > 2 && !page.complaints.length ? 0 : 1;
  } finally {
    await browser.close();
    await replay.stop();
    rmSync(directory, { recursive: true, force: true });
  }
  process.exit();
}
