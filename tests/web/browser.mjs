// Headless Chromium over its debugging pipe: what the checks of the live view need of it, and no packages.
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

export async function openBrowser() {
  const profile = mkdtempSync(join(tmpdir(), "troupe-web-"));
  const child = spawn(process.env.CHROMIUM || "chromium", ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
    "--remote-debugging-pipe", "--no-first-run", "--disable-dev-shm-usage", `--user-data-dir=${profile}`, "about:blank"],
    { stdio: ["ignore", "ignore", "ignore", "pipe", "pipe"] });
  let last = 0, rest = Buffer.alloc(0);
  const waiting = new Map(), listeners = [];
  child.stdio[4].on("data", data => {
    rest = Buffer.concat([rest, data]);
    for (let end; (end = rest.indexOf(0)) >= 0; rest = rest.subarray(end + 1)) {
      const message = JSON.parse(rest.subarray(0, end).toString());
      if (message.id) {
        const { done, fail } = waiting.get(message.id);
        waiting.delete(message.id);
        message.error ? fail(new Error(message.error.message)) : done(message.result);
      } else for (const listen of listeners) listen(message);
    }
  });
  const call = (method, params = {}, sessionId) => new Promise((done, fail) => {
    waiting.set(++last, { done, fail });
    child.stdio[3].write(JSON.stringify({ id: last, method, params, sessionId }) + "\0");
  });

  async function openPage(url, { width = 1280, height = 900, dark = false, scale = 1 } = {}) {
    const { targetId } = await call("Target.createTarget", { url: "about:blank" });
    const { sessionId } = await call("Target.attachToTarget", { targetId, flatten: true });
    const ask = (method, params) => call(method, params, sessionId);
    const complaints = [];
    listeners.push(message => {
      if (message.sessionId !== sessionId) return;
      const p = message.params;
      if (message.method === "Runtime.exceptionThrown") complaints.push(p.exceptionDetails.exception?.description || p.exceptionDetails.text);
      if (message.method === "Runtime.consoleAPICalled" && ["error", "warning"].includes(p.type)) complaints.push(p.args.map(a => a.value).join(" "));
      if (message.method === "Log.entryAdded" && p.entry.level === "error") complaints.push(p.entry.text + " " + (p.entry.url || ""));
    });
    await ask("Runtime.enable"); await ask("Log.enable"); await ask("Page.enable");
    await ask("Performance.enable", { timeDomain: "threadTicks" });
    await ask("Emulation.setDeviceMetricsOverride", { width, height, deviceScaleFactor: scale, mobile: width < 600 });
    await ask("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value: dark ? "dark" : "light" }] });
    await ask("Page.navigate", { url });
    const page = {
      complaints,
      async run(expression) {
        const { result, exceptionDetails } = await ask("Runtime.evaluate", { expression, awaitPromise: true, returnByValue: true });
        if (exceptionDetails) throw new Error(exceptionDetails.exception?.description || exceptionDetails.text);
        return result.value;
      },
      async until(expression, what, timeout = 15000) {
        for (const end = Date.now() + timeout; Date.now() < end; await new Promise(done => setTimeout(done, 50)))
          if (await page.run(expression).catch(() => false)) return;
        throw new Error(`never came true: ${what || expression}`);
      },
      // Processor time that scripts have taken so far, in ms: not the time of whatever else the machine is doing.
      async scriptTime() {
        const { metrics } = await ask("Performance.getMetrics");
        return metrics.find(m => m.name === "ScriptDuration").value * 1000;
      },
      async key(key) {
        const code = { Tab: 9, Enter: 13, Home: 36, End: 35, ArrowLeft: 37, ArrowUp: 38, ArrowRight: 39, ArrowDown: 40 }[key];
        for (const type of ["rawKeyDown", "keyUp"]) await ask("Input.dispatchKeyEvent", { type, key, code: key, windowsVirtualKeyCode: code });
      },
      async picture(file, full = true) {
        const { cssContentSize } = await ask("Page.getLayoutMetrics");
        const clip = full ? { x: 0, y: 0, width, height: Math.ceil(cssContentSize.height), scale: 1 } : undefined;
        const { data } = await ask("Page.captureScreenshot", { format: "png", captureBeyondViewport: full, clip });
        writeFileSync(file, Buffer.from(data, "base64"));
      },
      close: () => call("Target.closeTarget", { targetId }),
    };
    return page;
  }
  async function close() {
    child.kill("SIGKILL");
    await new Promise(done => child.once("exit", done));
    for (let i = 0; i < 5; i++) try { rmSync(profile, { recursive: true, force: true }); break; } catch { await new Promise(done => setTimeout(done, 200)); }
  }
  return { openPage, close };
}
