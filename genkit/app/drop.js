// The value is the image that was dropped or chosen, as a data URL: at most 512 pixels a side
const LONGEST = 512;
const show = (text) => {
  element.querySelector(".drop span").textContent = text;
};
const take = async (file) => {
  if (!file) return;
  const image = await createImageBitmap(file).catch(() => null);
  if (!image) return show("This file is no image that the browser can read.");
  const share = Math.min(1, LONGEST / Math.max(image.width, image.height));
  const sheet = document.createElement("canvas");
  sheet.width = Math.max(1, Math.round(share * image.width));
  sheet.height = Math.max(1, Math.round(share * image.height));
  const pen = sheet.getContext("2d");
  pen.fillStyle = "#fff"; // behind what is transparent
  pen.fillRect(0, 0, sheet.width, sheet.height);
  pen.drawImage(image, 0, 0, sheet.width, sheet.height);
  const small = sheet.width * sheet.height <= 128 * 128; // without loss: every pixel counts
  props.value = small ? sheet.toDataURL("image/png") : sheet.toDataURL("image/jpeg", 0.95);
  trigger("input");
};
const choose = () => {
  const input = document.createElement("input");
  input.type = "file";
  input.accept = "image/*";
  input.onchange = () => take(input.files[0]);
  input.click();
};
element.addEventListener("click", (event) => {
  if (event.target.closest(".drop")) choose();
});
element.addEventListener("keydown", (event) => {
  if (event.target.closest(".drop") && ["Enter", " "].includes(event.key)) choose();
});
element.addEventListener("dragover", (event) => event.preventDefault());
element.addEventListener("drop", (event) => {
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});
