{{/* Parts of pods that server, Triton, job and test have in common. */}}

{{- define "sd-service.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "sd-service.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "sd-service.podBasics" -}}
serviceAccountName: {{ include "sd-service.serviceAccountName" . | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
securityContext: {{- include "sd-service.podSecurityContext" . | nindent 2 }}
{{- end -}}

{{/* A rollout has failed after so many seconds: nodes pull images, a job makes the engines, Triton loads them. */}}
{{- define "sd-service.progressDeadline" -}}
{{- $seconds := add 600 .Values.triton.startSeconds -}}
{{- if .Values.engines.add -}}
{{- $seconds = add $seconds .Values.engines.job.activeDeadlineSeconds -}}
{{- end -}}
{{- $seconds -}}
{{- end -}}

{{/* Where pods may run. Arguments: root, component, values, device. */}}
{{- define "sd-service.placement" -}}
{{- if and (eq .device "gpu") .root.Values.triton.gpu.runtimeClassName }}
runtimeClassName: {{ .root.Values.triton.gpu.runtimeClassName | quote }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- $tolerations := .values.tolerations }}
{{- if eq .device "gpu" }}
{{- $tolerations = append $tolerations (dict "key" .root.Values.triton.gpu.resource "operator" "Exists" "effect" "NoSchedule") }}
{{- end }}
{{- with $tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .values.topologySpread.enabled }}
topologySpreadConstraints:
  {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - topologyKey: {{ $key | quote }}
    maxSkew: 1
    whenUnsatisfiable: {{ $.values.topologySpread.whenUnsatisfiable | quote }}
    labelSelector:
      matchLabels: {{- include "sd-service.selectorLabels" (dict "root" $.root "component" $.component) | nindent 8 }}
    # An update's new pods are spread among themselves.
    matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end }}
{{- end -}}

{{/* The model repository as a volume, and where containers see it. Nothing for `shipped`: the images have it. */}}
{{- define "sd-service.models.volume" -}}
{{- if eq .Values.engines.source "claim" -}}
- name: models
  persistentVolumeClaim: {claimName: {{ include "sd-service.claim" . | quote }}}
{{- else if eq .Values.engines.source "volume" -}}
- name: models
  image: {reference: {{ .Values.engines.volume.reference | quote }}, pullPolicy: {{ .Values.images.pullPolicy }}}
{{- end -}}
{{- end -}}

{{/* Arguments: root, readOnly. */}}
{{- define "sd-service.models.mount" -}}
{{- if ne .root.Values.engines.source "shipped" -}}
- name: models
  mountPath: /models
  readOnly: {{ .readOnly }}
  {{- if and (eq .root.Values.engines.source "claim") .root.Values.engines.claim.subPath }}
  subPath: {{ .root.Values.engines.claim.subPath | quote }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* Waits for the engines that the job adds. An engine's descriptor is written last. */}}
{{- define "sd-service.waitContainer" -}}
{{- if .root.Values.engines.add -}}
- name: wait-for-engines
  image: {{ .image | quote }}
  imagePullPolicy: {{ .root.Values.images.pullPolicy | quote }}
  command:
    - sh
    - -c
    - 'for name in "$@"; do until [ -f "/models/engines/$name/engine.json" ]; do echo "waiting for $name"; sleep 5; done; done'
    - sh
    {{- range .root.Values.engines.add }}
    - {{ .name | quote }}
    {{- end }}
  resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {memory: 64Mi}}
  securityContext: {{- include "sd-service.securityContext" .root | nindent 4 }}
  volumeMounts: {{- include "sd-service.models.mount" (dict "root" .root "readOnly" true) | nindent 4 }}
{{- end -}}
{{- end -}}
