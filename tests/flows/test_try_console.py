import json, time, shutil, pytest
def step(errata,*w,**k):
    a=time.process_time(); b=time.time(); r=errata(*w,**k)
    with open("/tmp/try.log","a") as f: f.write(f"--- {w} {k} code={r.code} cpu={time.process_time()-a:.2f} wall={time.time()-b:.2f}\nOUT {r.out}\nERR {r.err}\n")
    return r
def test_try(used_desk, errata, tmp_path, make_edit, editable_folder, monkeypatch):
    s=lambda *w,**k: step(errata,*w,**k)
    s("status"); s("status","--json"); s("log"); s("log","--json"); s("show","1"); s("show","v1"); s("show","case-"); s("show","case-1"); s("show","case-1@1"); s("show","nope"); s("show","99"); s("show","v99"); s("show","head~1","--json")
    s("show","head"); s("show","head~9"); s("show", ""); s("show", make_edit(4).edit_id[:10])
    s("quarantine"); s("quarantine","--json")
    s("submit","-",stdin=make_edit(6,id="case-4",prompt="{} has long been living in",target_new="Zqx wvut").model_dump_json(exclude_none=True).encode()+b"\n{}\n")
    s("submit","--check","--json","-",stdin=make_edit(6,id="case-4",prompt="{} has long been living in",target_new="Zqx wvut").model_dump_json(exclude_none=True).encode()+b"\n{}\n")
    s("apply","--dry-run"); s("apply"); s("apply")
    s("quarantine","retry","case-4"); s("apply","--json"); s("quarantine","drop","--all"); s("quarantine","drop","--all"); s("quarantine", "retry")
    s("submit","--prompt","The home of {} is","--subject","X"); s("submit"); s("submit","/nonexist"); s("submit", str(tmp_path))
    s("ask", make_edit(0).rewrite_prompt,"--max-new-tokens","1","--json"); s("ask"); s("ask", ""); s("ask","a "*500, "--max-new-tokens","1")
    s("repair"); s("doctor"); s("doctor","--json"); s(); s("--help"); s("bogus"); s("status","--bogus"); s("status","--stream","other"); s("status","--stream","Other!!")
    s("submit", "--prompt","The home of {}","--subject","Anna Keller","--target","Rome"); 
    s("apply", typed="n\n"); s("apply", typed=""); s("apply", typed="y\n"); s("log","-n","0"); s("log","-n","x")
    monkeypatch.setenv("ERRATA_DEVICE","banana"); s("doctor"); s("ask","a")
