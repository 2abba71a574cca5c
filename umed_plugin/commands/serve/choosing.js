// ---- Choosing images.

async function choose(list) {
  const files = [...list].filter(file => file.size > 0 && !file.name.startsWith("."));
  if (!files.length) return;
  const mine = ++state.uploads;
  const total = files.reduce((sum, file) => sum + file.size, 0), most = Number(document.body.dataset.uploadMb);
  fault("");
  if (total > most * 1e6) {
    return fault(`${files.length === 1 ? files[0].name : "These files"}: ${(total / 1e6).toFixed(0)} MB. Allowed: ${most} MB. `
      + "Restart the server with a larger --upload-mb to send more.");
  }
  forget();
  $("progress").hidden = false;
  status(files.length === 1 ? "Uploading the file." : `Uploading ${files.length} files.`);
  const refused = [];
  let study = null;
  // The server holds a place for each upload, and a person has few: one that comes to nothing gives its place back.
  const giveUp = () => {
    if (study) send("POST", `/studies/${study}/forget`).catch(() => null);
  };
  try {
    study = (await send("POST", "/studies")).study;
    if (mine === state.uploads) state.coming = study;
    let sent = 0;
    for (const file of files) {
      if (mine !== state.uploads) return giveUp();
      try { await sendFile(`/studies/${study}/files`, file, loaded => { $("progress").value = (sent + loaded) / total; }); }
      catch (error) { if (files.length === 1 || error.message === GONE) throw error; refused.push(error.message); }
      sent += file.size;
    }
    status("Reading the images.");
    if (refused.length === files.length) throw new Error(refused.slice(0, 3).join(" "));
    const opened = await send("POST", `/studies/${study}/open`);
    if (mine !== state.uploads) return giveUp();
    begin(study, opened.items, [...refused, ...opened.left_out]);
    status("");
  } catch (error) {
    giveUp();
    if (mine === state.uploads) { status(""); fault(error.message); }
  } finally {
    if (mine === state.uploads) { state.coming = null; $("progress").hidden = true; }
  }
}

// The dropped files, including those in folders. All entries must be read from the event before the first await.
async function dropped(transfer) {
  const entries = [...transfer.items].map(item => item.webkitGetAsEntry()).filter(entry => entry), files = [...transfer.files];
  if (!entries.some(entry => entry.isDirectory)) return files;
  const inFolders = [];
  const walk = async entry => {
    if (entry.isFile) return void inFolders.push(await new Promise((take, fail) => entry.file(take, fail)));
    const reader = entry.createReader();
    for (let part; (part = await new Promise((take, fail) => reader.readEntries(take, fail))).length;) {
      for (const inner of part) await walk(inner);
    }
  };
  for (const entry of entries) await walk(entry);
  return inFolders;
}
