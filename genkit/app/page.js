() => {
  // What happens in the browser alone: lines while there is no result, copies, downloads
  window.genkit = {
    // Show a line in a canvas until there is a result, and scroll to it
    begin(canvas, text) {
      setTimeout(() => genkit.reveal(canvas), 100);
      return `<p class="hint busy">${text} …</p>`;
    },

    // The line while a model loads
    loading(model) {
      const line = document.createElement("p");
      line.className = "hint";
      line.textContent = `Loading ${model} …`; // a name may hold any character
      return line.outerHTML;
    },

    // Scroll to an element that is not in view, or begins too far down
    reveal(selector) {
      const found = document.querySelector(selector);
      const top = found.getBoundingClientRect().top;
      if (top < 0 || top > 0.5 * innerHeight) {
        found.scrollIntoView({ behavior: "smooth", block: "start" });
      }
    },

    // The text of an element, without the panels of its tokens and without buttons
    textOf(found) {
      const copy = found.cloneNode(true);
      copy.querySelectorAll(".panel, button").forEach((each) => each.remove());
      return copy.textContent;
    },

    copy(selector) {
      const found = document.querySelector(selector);
      if (found) genkit.copyText(genkit.textOf(found));
    },

    async copyText(text) {
      const button = document.activeElement;
      if (navigator.clipboard) {
        await navigator.clipboard.writeText(text);
      } else {
        // a page of another machine without TLS
        const area = document.createElement("textarea");
        area.value = text;
        document.body.append(area);
        area.select();
        document.execCommand("copy");
        area.remove();
      }
      button.classList.add("done");
      setTimeout(() => button.classList.remove("done"), 1500);
    },

    save(selector, file) {
      const found = document.querySelector(selector);
      if (found) genkit.saveBlob(new Blob([genkit.textOf(found)], { type: "text/plain" }), file);
    },

    saveBlob(blob, file) {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = file;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    },

    // All images of an element, pixel by pixel, side by side on one sheet
    saveImages(selector, file) {
      const images = [...document.querySelectorAll(`${selector} img`)];
      if (!images.length) return;
      const columns = Math.ceil(Math.sqrt(images.length));
      const [width, height] = [images[0].naturalWidth, images[0].naturalHeight];
      const sheet = document.createElement("canvas");
      sheet.width = columns * width;
      sheet.height = Math.ceil(images.length / columns) * height;
      const pen = sheet.getContext("2d");
      images.forEach((image, i) => {
        pen.drawImage(image, (i % columns) * width, Math.floor(i / columns) * height);
      });
      sheet.toBlob((blob) => genkit.saveBlob(blob, file), "image/png");
    },

    // A proxy that changes host or scheme makes the page refuse its own requests: name what helps
    async checkRoot() {
      const body = { method: "POST", headers: { "Content-Type": "application/json" }, body: '{"event_id": ""}' };
      const answer = await fetch(`${gradio_config.root}/gradio_api/reset`, body).catch(() => null);
      if (answer?.ok) return;
      const line = document.createElement("p");
      line.className = "problem";
      const here = location.origin + location.pathname.replace(/\/$/, "");
      line.textContent = `This page cannot reach its server from here. If a proxy passes requests on, start it by: genkit app … --root-path ${here}`;
      document.querySelector("main").prepend(line);
    },
  };
  genkit.checkRoot();
}
