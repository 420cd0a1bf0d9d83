// A made-up feed as large as they come: 320 processes, 58 routed layers x 256 experts, every load changing, copies of the hottest.
import { createServer } from "node:http";
import { readFileSync } from "node:fs";

const LAYERS = 61, FIRST = 3, EXPERTS = 256, PROCESSES = 320;

function makeFeed() {
  let random = 1;
  const next = n => (random = (random * 48271) % 2147483647) % n;
  const routed = Array.from({ length: LAYERS - FIRST }, (_, i) => i + FIRST);
  const members = Array.from({ length: PROCESSES }, (_, i) => {
    const role = i < 300 ? "expert" : i < 316 ? "attention" : i < 319 ? "sampler" : "gateway";
    return [i + 2, role, `${role}-${i}`, "ready", String(i).padStart(16, "0"), i < 300 ? 50 : 0, `host-${i >> 3}`];
  });
  const send = (name, body) => `event: ${name}\ndata: ${JSON.stringify({ v: 1, ...body })}\n\n`;
  let number = 0, turn = 0;
  const epoch = () => send("epoch", { epoch: ++number, serving: true, bias_version: 0, members,
    placement: routed.map(layer => [layer, Array.from({ length: EXPERTS }, () => next(8) ? 2 + next(300) : [2 + next(300), 2 + next(300)])]) });
  const load = base => {
    const cells = [];
    for (let i = 0, skip = 0; i < LAYERS * EXPERTS; i++) {
      if (i < FIRST * EXPERTS) { skip++; continue; }
      cells.push(skip, 1 + next((i + turn) % EXPERTS < 40 ? 900 : 300));
      skip = 0;
    }
    return send("load", { base, cells, balancedness: routed.flatMap(layer => [layer, .5 + next(400) / 1000]) });
  };
  const actors = () => send("actors", { stats_age_ms: next(200), actors: members.map(m => [m[0], next(200), 2, 5e9 + next(1e6), number, next(50), next(5), next(900), 1024, turn * 1000 + next(900), turn * 10, turn * 40, 0]) });
  const rates = () => send("rates", { t: Date.now(), window_ms: 250, running: 200, waiting: next(9), finished: next(9), failed: 0, resubmitted: 0,
    tokens_per_s: 9000 + next(2000), prompt_tokens_per_s: next(9000), cache: .5, ttft_ms: { count: 5, mean: 80 + next(60), p50: 90, p95: 180 }, tpot_ms: { count: 99, mean: 15 + next(5), p50: 16, p95: 25 + next(9) } });
  const moment = () => send("moment", { number: ++number, kind: "epoch", t: Date.now(), epoch: number, members: PROCESSES, serving: true });
  return {
    first: () => send("hello", { version: "synthetic", model: "v3-shape", gateway: "0", t: Date.now(), interval_ms: 250, heartbeat_ms: 200, layers: LAYERS, experts: EXPERTS, experts_per_token: 8, faults: false, routed }) + epoch() + load(true) + actors(),
    more: () => (turn++ % 8 === 0 ? epoch() + moment() : "") + (turn % 2 ? load(false) + actors() : "") + rates(),
  };
}

export function serveSynthetic() {
  const page = readFileSync(new URL("../../web/index.html", import.meta.url));
  const server = createServer((request, response) => {
    if (request.url !== "/troupe/events") { response.setHeader("Content-Type", "text/html; charset=utf-8"); response.end(page); return; }
    const feed = makeFeed();
    response.setHeader("Content-Type", "text/event-stream");
    response.write(feed.first());
    const timer = setInterval(() => response.write(feed.more()), 250);
    request.on("close", () => clearInterval(timer));
  });
  return new Promise(done => server.listen(0, "127.0.0.1", () => done({ url: `http://127.0.0.1:${server.address().port}/`, close: () => { server.closeAllConnections(); server.close(); } })));
}
