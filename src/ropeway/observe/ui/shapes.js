// What tells urgencies apart besides colour: a circle is HIGH, a square MEDIUM, a triangle LOW.

export const URGENCIES = ["high", "medium", "low"];
const SVG = "http://www.w3.org/2000/svg";

/** The outline of a cabin around (x, y). */
export function outline(ctx, urgency, x, y, r) {
  ctx.beginPath();
  if (urgency === "low") {
    ctx.moveTo(x - r, y - r * 0.8);
    ctx.lineTo(x + r, y - r * 0.8);
    ctx.lineTo(x, y + r);
    ctx.closePath();
  } else if (urgency === "medium") {
    ctx.roundRect(x - r * 0.86, y - r * 0.86, r * 1.72, r * 1.72, r * 0.25);
  } else {
    ctx.arc(x, y, r, 0, 2 * Math.PI);
  }
}

/** The same as an element, with its name for those who do not see it. */
export function mark(urgency) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "-8 -8 16 16");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", urgency);
  svg.classList.add("mark", urgency);
  const title = document.createElementNS(SVG, "title");
  title.textContent = `${urgency} urgency`;
  let shape;
  if (urgency === "low") {
    shape = document.createElementNS(SVG, "path");
    shape.setAttribute("d", "M-6-5H6L0 6Z");
  } else if (urgency === "medium") {
    shape = document.createElementNS(SVG, "rect");
    for (const [name, value] of Object.entries({ x: -5, y: -5, width: 10, height: 10, rx: 1.5 })) shape.setAttribute(name, value);
  } else {
    shape = document.createElementNS(SVG, "circle");
    shape.setAttribute("r", 5.5);
  }
  svg.append(title, shape);
  return svg;
}
