/* What pages do beyond HTML: times in the viewer's zone, countdowns, copying, plots. Each thing by a data attribute; nothing
   else of a page needs it. It runs again on what htmx brings in. */
(() => {
  "use strict";
  const day = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
  const tooOld = 24 * 3600;

  const local = (root) => {
    for (const time of root.querySelectorAll("time[data-local]")) {
      time.textContent = day.format(new Date(time.dateTime));
    }
  };

  const left = (seconds) => {
    if (seconds <= 0) return "over";
    const parts = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
    return parts[0] ? `${parts[0]} h ${parts[1]} min` : `${parts[1]}:${String(parts[2]).padStart(2, "0")}`;
  };

  const countdown = () => {
    for (const time of document.querySelectorAll("time[data-countdown]")) {
      const until = new Date(time.dateTime);
      const seconds = Math.round((until - Date.now()) / 1000);
      time.textContent = seconds > tooOld ? day.format(until) : `${left(seconds)} (${day.format(until)})`;
    }
  };

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
    } catch {
      const area = document.createElement("textarea");
      area.value = button.dataset.copy;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    const words = (button.dataset.words ??= button.textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = words; }, 1500);
  });

  /* A second click sends nothing; the server would take it for the first again. */
  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (form.dataset.sent) return event.preventDefault();
    form.dataset.sent = "yes";
    setTimeout(() => { delete form.dataset.sent; }, 5000);
  });

  /* Who goes through choices by keys has not chosen yet: for them there is the form's button. */
  let byKeys = false;
  document.addEventListener("keydown", () => { byKeys = true; }, true);
  document.addEventListener("pointerdown", () => { byKeys = false; }, true);
  document.addEventListener("change", (event) => {
    if (!byKeys && event.target.matches("form[data-submits] *")) event.target.form.requestSubmit();
  });

  const colours = ["#3b6cf6", "#0c9a6c", "#d9822b", "#a855c7", "#d6455d", "#0e94a8", "#8b8f1f", "#7a7a88"];

  /* Stacked bars: data-plot is {"labels": ["2026-11-28", …], "unit": "$", "series": [{"name": …, "values": [numbers]}]}. */
  const plot = (box) => {
    if (box.firstChild || !window.uPlot) return;
    const given = JSON.parse(box.dataset.plot);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const ink = () => (dark.matches ? "#a9a9b4" : "#5b5b66"), line = () => (dark.matches ? "#3a3a42" : "#e2e2e8");
    const xs = given.labels.map((_, index) => index);
    const sums = xs.map(() => 0);
    const stacked = given.series.map((each) => each.values.map((value, index) => (sums[index] += value)));
    const bars = uPlot.paths.bars({ size: [0.7, 60] });
    const series = given.series.map((each, index) => ({
      label: each.name, fill: colours[index % colours.length], stroke: colours[index % colours.length], width: 0,
      paths: bars, points: { show: false },
      value: (_, __, ___, at) => (at == null ? "–" : given.unit + each.values[at].toLocaleString()),
    }));
    /* The highest first: each is drawn over the one behind it. */
    const options = {
      width: box.clientWidth, height: 240, cursor: { drag: { x: false } }, legend: { live: true },
      scales: { x: { time: false, range: [-0.6, xs.length - 0.4] }, y: { range: (_, __, most) => [0, most * 1.1 || 1] } },
      axes: [
        { stroke: ink, grid: { show: false }, ticks: { stroke: line }, values: (_, at) => at.map((x) => given.labels[x] ?? "") },
        { stroke: ink, grid: { stroke: line }, ticks: { stroke: line }, size: 70, values: (_, at) => at.map((y) => given.unit + y.toLocaleString()) },
      ],
      series: [{ label: "", value: (_, x) => given.labels[x] ?? "–" }, ...series.toReversed()],
    };
    const made = new uPlot(options, [xs, ...stacked.toReversed()], box);
    dark.addEventListener("change", () => made.redraw());
    new ResizeObserver(() => made.setSize({ width: box.clientWidth, height: 240 })).observe(box);
  };

  /* A connection's QR code from a picture, where the browser can read one. */
  const scan = (input) => {
    if (!("BarcodeDetector" in window) || input.dataset.ready) return;
    input.dataset.ready = "yes";
    input.hidden = false;
    input.addEventListener("change", async () => {
      const [found] = await new BarcodeDetector({ formats: ["qr_code"] }).detect(await createImageBitmap(input.files[0]));
      if (found) input.form.elements[input.dataset.scan].value = found.rawValue;
    });
  };

  const prepare = (root) => {
    local(root);
    countdown();
    for (const box of root.querySelectorAll("[data-plot]")) plot(box);
    for (const input of root.querySelectorAll("[data-scan]")) scan(input);
  };
  prepare(document);
  document.addEventListener("htmx:after:swap", () => prepare(document));
  setInterval(countdown, 1000);
})();
