# What makes a configuration fail although each value has its type: assertions of NixOS itself,
# and mistakes that NixOS lets through and a machine does not survive. Each is a rule and the
# mistakes against it, none where all is well.
{
  config,
  lib,
  files,
  store,
}:

let
  inherit (builtins)
    attrNames
    concatMap
    elem
    elemAt
    filter
    head
    isString
    length
    map
    match
    split
    ;

  isUser = name: config.users.users ? ${name};
  isGroup = name: config.users.groups ? ${name};
  matches = pattern: text: match pattern text != null;
  wordsBetween = separator: text: filter (word: isString word && word != "") (split separator text);

  # ── Services, and the words of their commands ──
  services = config.systemd.services;
  perService = f: concatMap (name: f name services.${name}) (attrNames services);

  # Units of ours, and of systemd and NixOS.
  units = map (name: "${name}.service") (attrNames services) ++ [
    "dbus.service"
    "local-fs.target"
    "multi-user.target"
    "network-online.target"
    "network.target"
    "sysinit-reactivation.target"
  ];
  unitsNamedBy =
    service:
    service.after
    ++ service.before
    ++ service.wants
    ++ service.requires
    ++ service.wantedBy
    ++ service.requiredBy;

  # Flags and their values apart, and what stands in the files of ours that a command names.
  words = wordsBetween "[][[:space:]\\\"={},:]+";
  wordsOf =
    service:
    let
      commands = filter (matches "Exec.*") (attrNames service.serviceConfig);
      text = toString (map (name: service.serviceConfig.${name}) commands);
    in
    concatMap (word: [ word ] ++ words (files.${word}.text or "")) (words text);
  perWord =
    isWrong: what:
    perService (
      name: service:
      map (word: "${name}.service names ${word}, ${what}") (filter isWrong (wordsOf service))
    );

  # ── tmpfiles rules: type, path, mode, user, group, age, argument ──
  rules = map (wordsBetween " +") config.systemd.tmpfiles.rules;
  field = index: rule: if length rule > index then elemAt rule index else "-";
  pathOf = field 1;
  modeOf = field 2;
  userOf = field 3;
  groupOf = field 4;
  perRule = isWrong: what: map (rule: "${what}: ${toString rule}") (filter isWrong rules);

  # ── What a word may not be ──
  # In the store, but neither a program of a package nor a file that the evaluation writes.
  notInStore =
    word:
    let
      parts = match "(/nix/store/[^/]+)/bin/([^/]+)" word;
      program = parts != null && elem (elemAt parts 1) (store.${head parts}.bin or [ ]);
    in
    matches "/nix/store/.*" word && !program && !(files ? ${word});
  # Where other systems keep programs and libraries, and NixOS has nothing unless a rule makes it.
  elsewhere =
    word:
    matches "(/usr|/bin|/sbin|/lib|/lib64|/opt)(/.*)?" word
    && !(elem word ([ "/bin/sh" "/usr/bin/env" ] ++ map pathOf rules));
  unwritten = word: matches "/etc/kubernetes/.+" word && !(files ? ${word});
  notHandedOver = word: matches "/var/lib/kubernetes/.+" word && !(elem word (map pathOf rules));

  isSecret = matches ".*(-key\\.pem|\\.kubeconfig|/encryption-config\\.yaml|_key)";

  # ── Users ──
  users = config.users.users;
  perUser = isWrong: what: map (name: "${name} ${what}") (filter isWrong (attrNames users));

  rule = name: mistakes: { inherit name mistakes; };
  holds = name: condition: rule name (lib.optional (!condition) name);
in
map (assertion: holds assertion.message assertion.assertion) config.assertions
++ [
  (holds "root can log in by key" (users.root.openssh.authorizedKeys.keys != [ ]))
  (rule "nobody has a password" (
    perUser (name: users.${name}.hashedPassword != null && users.${name}.hashedPassword != "!") (
      "has a password"
    )
  ))
  (rule "each user is a system user with a group that exists" (
    perUser (
      name: !(isGroup users.${name}.group && (name == "root" || users.${name}.isSystemUser))
    ) "is no system user, or its group does not exist"
  ))
  (holds "there is a root file system, and an ESP for systemd-boot" (
    config.fileSystems ? "/"
    && (config.fileSystems ? "/boot" || !config.boot.loader.systemd-boot.enable)
  ))
  (rule "each service runs as a user and group that exist" (
    perService (
      name: service:
      let
        user = service.serviceConfig.User or "root";
        group = service.serviceConfig.Group or "root";
      in
      lib.optional (
        !(isUser user && isGroup group)
      ) "${name}.service runs as ${user}:${group}, which does not exist"
    )
  ))
  (rule "each service has something to run" (
    perService (
      name: service: lib.optional (!(service.serviceConfig ? ExecStart)) "${name}.service has no ExecStart"
    )
  ))
  (rule "each unit that a service names exists" (
    perService (
      name: service:
      map (unit: "${name}.service names ${unit}, which does not exist") (
        filter (unit: !(elem unit units)) (unitsNamedBy service)
      )
    )
  ))
  (rule "each program in a command is one of its package" (
    perWord notInStore "which no package has"
    ++ map (word: "a tmpfiles rule names ${word}, which no package has") (
      filter notInStore (builtins.concatLists rules)
    )
  ))
  (rule "no command names a place that NixOS does not have" (
    perWord elsewhere "a place that NixOS does not have"
  ))
  (rule "each file in /etc that a command names is written" (
    perWord unwritten "which no environment.etc writes"
  ))
  (rule "each key and kubeconfig that a command names is handed to its user" (
    perWord notHandedOver "which no tmpfiles rule hands over"
  ))
  (rule "the users and groups of tmpfiles rules exist" (
    perRule (rule: userOf rule != "-" && !isUser (userOf rule)) "tmpfiles rule of an unknown user"
    ++ perRule (rule: groupOf rule != "-" && !isGroup (groupOf rule)) "tmpfiles rule of an unknown group"
  ))
  (rule "no secret can be read by everybody" (
    perRule (
      rule: isSecret (pathOf rule) && modeOf rule != "0600" && modeOf rule != "0640"
    ) "a secret that others can read"
  ))
]
