// What report_browser.sh puts before the scripts of a report: it collects everything that goes wrong, moves every slider to
// every place, looks whether the colours of its chart change, and leaves the verdict in the page.
const problems = [];
addEventListener("error", (event) => problems.push(event.message ?? "not loaded: " + event.target.outerHTML), true);
addEventListener("unhandledrejection", (event) => problems.push("rejected: " + event.reason));
addEventListener("securitypolicyviolation", (event) => problems.push("forbidden: " + event.blockedURI));
for (const level of ["error", "warn"]) {
  console[level] = (...what) => problems.push(level + ": " + what.join(" "));
}

const colours = (chart) => [...chart.querySelectorAll(".shares path")].map((cell) => cell.getAttribute("fill")).join();
const until = async (done) => {
  for (let i = 0; i < 100 && !done(); ++i) {
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return done();
};

addEventListener("load", async () => {
  const charts = [...document.querySelectorAll(".chart")];
  const drawn = (chart) => [...chart.querySelectorAll(".shares path, .mark-line path, .mark-symbol path")].some(
    (mark) => mark.getBoundingClientRect().width > 0);
  if (!await until(() => charts.every(drawn))) {
    problems.push("not drawn: " + charts.filter((chart) => !drawn(chart)).length + " of " + charts.length + " charts");
  }
  const sliders = [...document.querySelectorAll("input[type=range]")];
  for (const slider of sliders) {
    const chart = slider.closest(".sliders").nextElementSibling;
    const name = chart.ariaLabel + ": the slider '" + slider.name + "'";
    if (!slider.labels[0]?.textContent.trim()) {
      problems.push(name + " has no label");
    }
    const first = colours(chart);
    const move = async (value) => {
      const before = colours(chart);
      slider.value = value;
      slider.dispatchEvent(new Event("input", { bubbles: true }));
      if (!await until(() => colours(chart) !== before)) {
        problems.push(name + " changes nothing at " + value);
      }
    };
    for (let value = Number(slider.min) + 1; value <= Number(slider.max); ++value) {
      await move(value);
    }
    await move(slider.min);
    if (colours(chart) !== first) {
      problems.push(name + " does not find back");
    }
  }
  for (const chart of charts) {
    if (!chart.ariaLabel || chart.ariaLabel === "Vega visualization") {
      problems.push("chart without words");
    }
    const cell = chart.querySelector(".shares path, .mark-symbol:not(.role-legend-symbol) path");
    cell?.dispatchEvent(new MouseEvent("mousemove", { bubbles: true }));
    if (!await until(() => chart.querySelector("[title]") ?? chart.title)) {
      problems.push(chart.ariaLabel + ": no tooltip");
    }
  }
  for (const name of document.querySelectorAll("th")) {  // no word of it is broken
    const text = document.createRange();
    text.selectNodeContents(name);
    if (text.getClientRects().length > name.textContent.trim().split(/\s+/).length) {
      problems.push("a broken word: " + name.textContent);
    }
  }
  for (const picture of document.images) {
    if (picture.naturalWidth === 0 || !picture.alt) {
      problems.push("picture without pixels or words: " + picture.alt);
    }
  }
  document.body.style.width = "320px";  // a phone; Chromium has no window as narrow
  dispatchEvent(new Event("resize"));
  if (!await until(() => document.body.scrollWidth <= document.body.clientWidth &&
                         charts.every((chart) => chart.scrollWidth <= chart.clientWidth))) {
    problems.push("wider than a phone");
  }
  document.documentElement.dataset.verdict =
    problems.length > 0 ? problems.join("; ") : "good: " + sliders.length + " sliders, " + charts.length + " charts";
});
