// What headless Chromium makes of a report's page.
//
// usage: node report_check.mjs WORK CHROMIUM PAGE.html ...
//
// WORK has axe-core and playwright-core in node_modules, and takes the pictures. For each page, in light, in dark and 360 pixels wide, with its
// tables open: axe-core finds no violation; nothing is wider than the window; no text of a figure leaves it or covers another; the page asks
// for nothing but itself, and its own policy forbids nothing that it does. Once: the Tab key reaches every link, table and region, and Enter opens a
// table; scripts are forbidden; on paper the colours are those of the light scheme, and there are pages. Prints a line for each; exit
// code 1 when one fails.
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { basename, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [work, chromium, ...pages] = process.argv.slice(2);
const require = createRequire(join(work, "node_modules", "x.js"));
const playwright = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const arguments_ = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
const looks = [
  { name: "light", colorScheme: "light", viewport: { width: 1280, height: 900 } },
  { name: "dark", colorScheme: "dark", viewport: { width: 1280, height: 900 } },
  { name: "narrow", colorScheme: "light", viewport: { width: 360, height: 740 } },
];
let failures = 0;

function check(page, what, problems) {
  console.log(`${problems.length ? "FAILED" : "ok"}  ${page}: ${what}`);
  for (const problem of problems) console.log(`        ${problem}`);
  failures += problems.length;
}

// Texts that leave their figure, or cover one another by more than a pixel.
function crowded() {
  const problems = [];
  for (const svg of document.querySelectorAll("svg.plot, svg.bar")) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map((text) => [text.textContent.trim(), text.getBoundingClientRect()]);
    for (const [text, box] of texts) {
      const out = Math.max(frame.left - box.left, box.right - frame.right, frame.top - box.top, box.bottom - frame.bottom);
      if (out > 1) problems.push(`"${text}" is ${out.toFixed(1)} px outside of ${svg.querySelector("title").textContent}`);
    }
    texts.forEach(([text, a], index) => {
      for (const [other, b] of texts.slice(index + 1)) {
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        // A line's box has room above and below its digits.
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) - 0.3 * Math.min(a.height, b.height);
        if (across > 1 && down > 1) problems.push(`"${text}" covers "${other}" in ${svg.querySelector("title").textContent}`);
      }
    });
  }
  return problems;
}

async function look(context, file, name, view) {
  const page = await context.newPage();
  const heard = [];
  page.on("console", (message) => heard.push(`the console says: ${message.text()}`));
  page.on("pageerror", (error) => heard.push(`an error: ${error.message}`));
  page.on("request", (request) => {
    if (request.url() !== pathToFileURL(file).href) heard.push(`asks for ${request.url().slice(0, 120)}`);
  });
  await page.goto(pathToFileURL(file).href);
  await page.screenshot({ path: join(work, "shots", `${basename(file, ".html")}-${view.name}.png`), fullPage: true });
  check(name, `${view.name}, asks for nothing`, heard);

  await page.evaluate(() => document.querySelectorAll("details").forEach((details) => { details.open = true; }));
  await page.evaluate(axe);
  const found = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  check(name, `${view.name}, axe-core ${found.testEngine.version}, ${found.passes.length} rules passed`,
    found.violations.flatMap((violation) => violation.nodes.map((node) => `${violation.id}: ${node.target} ${node.html.slice(0, 160)}`)));
  const width = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  check(name, `${view.name}, no wider than its window`, width > 0 ? [`${width} px too wide`] : []);
  check(name, `${view.name}, texts of figures have room`, await page.evaluate(crowded));
  await page.close();
}

async function use(context, file, name) {
  const page = await context.newPage();
  await page.goto(pathToFileURL(file).href);
  const all = await page.evaluate(() => {
    const stops = [...document.querySelectorAll("a[href], summary, [tabindex='0']")].filter((stop) => stop.checkVisibility());
    stops.forEach((stop, index) => { stop.dataset.stop = index; });
    return stops.length;
  });
  const reached = new Set();
  for (let press = 0; press < all; press += 1) {
    await page.keyboard.press("Tab");
    reached.add(await page.evaluate(() => document.activeElement.dataset.stop));
  }
  reached.delete(undefined);
  check(name, `Tab reaches all of ${all} stops`, reached.size === all ? [] : [`${reached.size} of them`]);
  const closed = page.locator("details:not([open]) > summary");
  if (await closed.count()) {
    const before = await closed.count();
    await closed.first().focus();
    await page.keyboard.press("Enter");
    check(name, "Enter opens a table", (await closed.count()) === before - 1 ? [] : ["it stays closed"]);
  }
  const ran = await page.evaluate(() => {
    const script = document.createElement("script");
    script.textContent = "window.ran = true";
    document.head.append(script);
    return window.ran === true;
  });
  check(name, "scripts are forbidden", ran ? ["one ran"] : []);

  await page.emulateMedia({ media: "print", colorScheme: "dark" });
  const paper = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const pdf = await page.pdf({ path: join(work, "shots", `${basename(file, ".html")}.pdf`), format: "A4", preferCSSPageSize: true });
  const problems = paper === "rgb(255, 255, 255)" ? [] : [`paper is ${paper}`];
  if (pdf.subarray(0, 5).toString() !== "%PDF-") problems.push("no PDF");
  check(name, "prints on white", problems);
  await page.close();
}

const profile = mkdtempSync(join(tmpdir(), "report-"));
try {
  for (const view of looks) {
    const { name: _, ...options } = view;
    const context = await playwright.chromium.launchPersistentContext(join(profile, view.name),
      { executablePath: chromium, headless: true, args: arguments_, offline: true, ...options });
    for (const page of pages) {
      await look(context, resolve(page), page, view);
      if (view.name === "dark") await use(context, resolve(page), page);
    }
    await context.close();
  }
} finally {
  rmSync(profile, { recursive: true, force: true });
}
if (pages.length === 0) throw new Error("no page was given");
process.exitCode = failures ? 1 : 0;
