// The plain page: follows /gpulane/v1/events and shows gpus and jobs. Text reaches the page by textContent alone.

const JOBS_SHOWN = 200;
const RELOAD_MS = 1000;

const byId = (id) => document.getElementById(id);
let jobs = [];
let reloadTimer = 0;
let isLoading = false;

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = String(text);
  if (className) made.className = className;
  return made;
}

function gibibytes(bytes) {
  return bytes === null ? "?" : (bytes / 2 ** 30).toFixed(1);
}

function showGpus(gpus) {
  byId("gpus").replaceChildren(...gpus.map((gpu) => {
    const item = element("li");
    item.append(element("span", gpu.state, `state ${gpu.state}`), element("span", gpu.id, "name"));
    if (gpu.why) item.append(element("p", gpu.why));
    if (gpu.job) item.append(element("p", `job ${gpu.job}`));
    if (gpu.vram.bytes_total !== null) {
      item.append(element("p", `${gibibytes(gpu.vram.bytes_free)} of ${gibibytes(gpu.vram.bytes_total)} GiB free`));
    }
    for (const engine of gpu.engines) {
      const line = element("p", `${engine.service} ${engine.url} `);
      line.append(element("span", engine.state, engine.state));
      if (engine.model) line.append(` · ${engine.model}`);
      if (engine.why) line.append(` · ${engine.why}`);
      item.append(line);
    }
    return item;
  }));
}

function showCounts(queue) {
  const paused = queue.paused ? " · paused" : "";
  byId("counts").textContent = `${queue.running} running · ${queue.waiting} waiting${paused}`;
}

function seconds(value) {
  return value < 90 ? `${Math.round(value)} s` : `${Math.round(value / 60)} min`;
}

function detail(job) {
  const cell = element("td");
  if (job.state === "running") {
    const bar = element("progress");
    if (job.progress) {
      bar.max = job.progress.max || 1;
      bar.value = job.progress.value;
    }
    bar.setAttribute("aria-label", "progress");
    cell.append(bar);
    if (job.progress && job.progress.text) cell.append(element("div", job.progress.text));
  } else if (job.error) {
    cell.textContent = job.error.message;
  } else if (job.reason) {
    cell.textContent = job.reason.text;
  }
  if (job.estimated_start_seconds) {
    const [low, high] = job.estimated_start_seconds.map(seconds);
    cell.append(element("div", low === high ? `starts in about ${low}` : `starts in ${low} to ${high}`));
  }
  return cell;
}

function showJobs() {
  const rank = { running: 0, queued: 1, waiting_retry: 1 };
  const order = (job) => rank[job.state] ?? 2;
  const sorted = [...jobs].sort((a, b) => order(a) - order(b) || (a.position ?? 1e9) - (b.position ?? 1e9));
  byId("jobs").replaceChildren(...sorted.map((job) => {
    const row = element("tr");
    row.title = job.id;
    row.append(
      element("td", job.cancel_wanted && job.state === "running" ? "cancelling" : job.state, job.state),
      element("td", job.position ?? ""),
      element("td", `${job.service} ${job.kind}`),
      element("td", job.user),
      element("td", job.model ?? ""),
      element("td", job.gpu ?? ""),
      detail(job),
      element("td", new Date(job.created_at).toLocaleTimeString()),
    );
    return row;
  }));
  byId("empty").hidden = jobs.length > 0;
}

async function load() {
  reloadTimer = 0;
  if (isLoading) return;
  isLoading = true;
  try {
    const answer = await fetch(`/gpulane/v1/jobs?limit=${JOBS_SHOWN}`);
    if (answer.ok) {
      jobs = (await answer.json()).jobs;
      showJobs();
    }
  } catch {
    // The event stream says when the gateway is there again.
  } finally {
    isLoading = false;
  }
}

function reloadSoon() {
  if (!reloadTimer && !document.hidden) reloadTimer = setTimeout(load, RELOAD_MS);
}

const events = new EventSource("/gpulane/v1/events");
events.addEventListener("open", () => { byId("connection").textContent = ""; reloadSoon(); });
events.addEventListener("error", () => { byId("connection").textContent = "no connection, trying again …"; });
events.addEventListener("gpus", (event) => showGpus(JSON.parse(event.data).gpus));
events.addEventListener("queue", (event) => { showCounts(JSON.parse(event.data).queue); reloadSoon(); });
events.addEventListener("state", reloadSoon);
events.addEventListener("progress", (event) => {
  const message = JSON.parse(event.data);
  const job = jobs.find((each) => each.id === message.id);
  if (job && job.state === "running") {
    job.progress = message;
    showJobs();
  }
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) load(); });
load();
