// The value is a point of the square, in [0, 1] both ways: "across up"
const report = (event) => {
  const box = element.querySelector(".pad").getBoundingClientRect();
  const share = (at, start, size) => Math.min(1, Math.max(0, (at - start) / size)).toFixed(3);
  const up = 1 - share(event.clientY, box.top, box.height);
  props.value = `${share(event.clientX, box.left, box.width)} ${up.toFixed(3)}`;
  trigger("input");
};
element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".pad")) return;
  event.preventDefault();
  element.setPointerCapture(event.pointerId);
  report(event);
});
element.addEventListener("pointermove", (event) => {
  if (element.hasPointerCapture(event.pointerId)) report(event);
});
